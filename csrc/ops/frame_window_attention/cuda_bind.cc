// What _cuda offers of this op besides the op itself.
#include "bindings/op_binding.h"
#include "ops/frame_window_attention/cuda.h"
#include "ops/frame_window_attention/cuda_heuristics.h"

namespace pyengine::ops {

void visit(bindings::Arguments& in, FrameWindowAttention& op);  // bind.cc

namespace {

namespace py = bindings::py;
using py::arg;

int64_t workspace(const FrameWindowAttention& op, void*) {
  return cuda::frame_window_attention_workspace(op);
}

// How an attention of this shape would be launched: for tests and benchmarks.
py::dict launch(const std::string& scope, const std::string& dtype, int64_t batch, int64_t frames,
                int64_t tokens, int64_t heads, int64_t head_dim, int64_t ring, int processors,
                int64_t block_bytes, int64_t processor_bytes, bool warpgroups, bool may_split) {
  const DType type = dtype == "float32"   ? DType::float32
                     : dtype == "float16" ? DType::float16
                                          : DType::bfloat16;
  check(scope == "temporal" || scope == "frame",
        "[attention_launch] expected scope to be one of temporal, frame but got '", scope, "'");
  const cuda::AttentionShape shape{scope == "frame" ? Scope::frame : Scope::temporal,
                                   type,
                                   batch,
                                   frames,
                                   tokens,
                                   heads,
                                   head_dim,
                                   ring,
                                   true};
  const auto l =
      cuda::attention_launch(shape, {processors, block_bytes, processor_bytes, warpgroups}, may_split);
  static constexpr const char* kNames[] = {"rows", "temporal", "frame", "frame_group"};
  return py::dict(arg("kernel") = kNames[static_cast<int>(l.kernel)],
                  arg("grid") = py::make_tuple(l.grid_x, l.grid_y, l.grid_z),
                  arg("shared_bytes") = l.shared_bytes, arg("stages") = l.stages,
                  arg("sequences") = l.sequences, arg("team") = l.team, arg("query_tiles") = l.query_tiles,
                  arg("splits") = l.splits, arg("workspace_bytes") = l.workspace_bytes);
}

const bindings::Register registered([](py::module_& m) {
  bindings::define_op<FrameWindowAttention, workspace>(
      m, "frame_window_attention_workspace",
      "Bytes of the optional workspace of frame_window_attention with these arguments; only qkv, ring_key "
      "and "
      "scope matter.");
  m.def("attention_launch", &launch, py::kw_only(), arg("scope"), arg("dtype"), arg("batch"), arg("frames"),
        arg("tokens"), arg("heads"), arg("head_dim"), arg("ring"), arg("processors"), arg("block_bytes"),
        arg("processor_bytes"), arg("warpgroups") = false, arg("may_split") = false,
        "Which kernel an attention of this shape gets on a device with so many multiprocessors and so much "
        "shared memory, and how it is launched.");
  m.def("use_warpgroups", &cuda::use_warpgroups, arg("wanted"),
        "Whether attention of scope `frame` may use the kernel for Hopper's warpgroups; returns what was.");
});

}  // namespace

}  // namespace pyengine::ops
