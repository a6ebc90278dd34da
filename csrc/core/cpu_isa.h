// Which of the compiled instruction sets to use. Chosen once, PYENGINE_CPU_ISA overrides, the impossible is
// refused.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace pyengine {

enum class CpuIsa { baseline, avx2, avx512, avx512_bf16, amx };  // each contains the ones before it

const char* name(CpuIsa isa);

CpuIsa cpu_isa();  // throws std::invalid_argument if PYENGINE_CPU_ISA asks for too much
void set_cpu_isa(const std::string& name);  // "auto" returns to the choice at start
std::vector<CpuIsa> supported_isas();       // compiled in, and this CPU and kernel of the system can run them
std::vector<CpuIsa>
left_out_isas();  // better than those: this CPU could run them, but they were not compiled

// Picks this process's variant of a kernel that every ISA namespace defines:
//   PYENGINE_DECLARE_KERNEL(FlowStepKernel, flow_step_kernel)  ...  PYENGINE_PICK_KERNEL(flow_step_kernel)
#ifdef PYENGINE_HAVE_avx2
#define PYENGINE_IF_avx2(...) __VA_ARGS__
#else
#define PYENGINE_IF_avx2(...)
#endif
#ifdef PYENGINE_HAVE_avx512
#define PYENGINE_IF_avx512(...) __VA_ARGS__
#else
#define PYENGINE_IF_avx512(...)
#endif
#ifdef PYENGINE_HAVE_avx512_bf16
#define PYENGINE_IF_avx512_bf16(...) __VA_ARGS__
#else
#define PYENGINE_IF_avx512_bf16(...)
#endif
#ifdef PYENGINE_HAVE_amx
#define PYENGINE_IF_amx(...) __VA_ARGS__
#else
#define PYENGINE_IF_amx(...)
#endif

// clang-format off
#define PYENGINE_DECLARE_IN(isa, Type, variable) \
  namespace isa {                                \
  extern const Type variable;                    \
  }
#define PYENGINE_DECLARE_KERNEL(Type, variable)                             \
  PYENGINE_DECLARE_IN(baseline, Type, variable)                             \
  PYENGINE_IF_avx2(PYENGINE_DECLARE_IN(avx2, Type, variable))               \
  PYENGINE_IF_avx512(PYENGINE_DECLARE_IN(avx512, Type, variable))           \
  PYENGINE_IF_avx512_bf16(PYENGINE_DECLARE_IN(avx512_bf16, Type, variable)) \
  PYENGINE_IF_amx(PYENGINE_DECLARE_IN(amx, Type, variable))

#define PYENGINE_CASE(isa, variable) \
  case ::pyengine::CpuIsa::isa: return isa::variable;
#define PYENGINE_PICK_KERNEL(variable)                                                 \
  [&]() -> const auto& {                                                               \
    switch (::pyengine::cpu_isa()) {                                                   \
      PYENGINE_CASE(baseline, variable)                                                \
      PYENGINE_IF_avx2(PYENGINE_CASE(avx2, variable))                                  \
      PYENGINE_IF_avx512(PYENGINE_CASE(avx512, variable))                              \
      PYENGINE_IF_avx512_bf16(PYENGINE_CASE(avx512_bf16, variable))                    \
      PYENGINE_IF_amx(PYENGINE_CASE(amx, variable))                                    \
      default: throw std::logic_error("cpu_isa() chose an ISA that was not compiled"); \
    }                                                                                  \
  }()
// clang-format on

}  // namespace pyengine
