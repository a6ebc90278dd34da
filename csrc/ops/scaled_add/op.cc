#include "ops/scaled_add/op.h"

namespace pyengine::ops {

void scaled_add(const ScaledAdd& op) {
  constexpr Expect expect{"scaled_add"};
  check(op.x.rank == 2, "[scaled_add] expected x [rows, values] but got ", op.x);
  for (const auto& [what, t] : {std::pair{"x", op.x}, {"y", op.y}, {"out", op.out}})
    expect.input(what, t, DType::float32, {op.x.shape[0], op.x.shape[1]});
  expect.writable("out", op.out);
  for (int64_t i = 0; i < op.x.size(); ++i)
    op.out.as<float>()[i] = op.x.as<float>()[i] + static_cast<float>(op.scale) * op.y.as<float>()[i];
}

}  // namespace pyengine::ops
