#include "core/cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <sstream>

#if defined(__x86_64__) || defined(__i386__)
#define PYENGINE_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyengine {

namespace {

constexpr CpuIsa kAll[] = {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16, CpuIsa::amx};

#ifdef PYENGINE_X86

struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

bool bit(unsigned word, int i) {
  return (word >> i) & 1u;
}

// The registers that the operating system saves on a context switch (XCR0).
uint64_t saved_registers() {
  if (!bit(Cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux hands out the 8 kB of tile state per thread on request only; granted for the whole process.
bool request_tiles() {
#ifdef __linux__
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

bool machine_has(CpuIsa isa) {
  const Cpuid leaf1(1, 0), leaf7(7, 0), leaf7b(7, 1);
  const uint64_t saved = saved_registers();
  switch (isa) {
    case CpuIsa::baseline:
      return true;
    case CpuIsa::avx2:
      return bit(leaf7.b, 5) && bit(leaf1.c, 12) && (saved & 0x6) == 0x6;
    case CpuIsa::avx512:
      return machine_has(CpuIsa::avx2) && (saved & 0xe6) == 0xe6 && bit(leaf7.b, 16) && bit(leaf7.b, 17) &&
             bit(leaf7.b, 30) && bit(leaf7.b, 31);
    case CpuIsa::avx512_bf16:
      return machine_has(CpuIsa::avx512) && bit(leaf7b.a, 5);
    case CpuIsa::amx:
      return machine_has(CpuIsa::avx512_bf16) && (saved & 0x60000) == 0x60000 && bit(leaf7.d, 22) &&
             bit(leaf7.d, 24) && request_tiles();
  }
  throw std::logic_error("machine_has: unknown ISA");
}
#else
bool machine_has(CpuIsa isa) {
  return isa == CpuIsa::baseline;
}
#endif

bool is_compiled(CpuIsa isa) {
  switch (isa) {
  PYENGINE_IF_avx2(case CpuIsa::avx2:) PYENGINE_IF_avx512(case CpuIsa::avx512:)
      PYENGINE_IF_avx512_bf16(case CpuIsa::avx512_bf16:)
          PYENGINE_IF_amx(case CpuIsa::amx:) case CpuIsa::baseline:
    return true;
    default : return false;
  }
}

CpuIsa parse(const std::string& text, const char* source) {
  std::ostringstream known;
  for (CpuIsa isa : supported_isas()) {
    if (text == name(isa)) return isa;
    known << (isa == CpuIsa::baseline ? "" : ", ") << name(isa);
  }
  for (CpuIsa isa : kAll)
    if (text == name(isa))
      throw std::invalid_argument(std::string("[cpu_isa] expected ") + source + " to be one of " +
                                  known.str() + " but got " + text + ", which " +
                                  (is_compiled(isa) ? "this CPU lacks" : "this build left out"));
  throw std::invalid_argument(std::string("[cpu_isa] expected ") + source + " to be one of " + known.str() +
                              " but got '" + text + "'");
}

CpuIsa choose() {
  const char* asked = std::getenv("PYENGINE_CPU_ISA");
  if (asked && *asked) return parse(asked, "PYENGINE_CPU_ISA");
  return supported_isas().back();
}

std::atomic<int> chosen{-1};

}  // namespace

const char* name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::baseline:
      return "baseline";
    case CpuIsa::avx2:
      return "avx2";
    case CpuIsa::avx512:
      return "avx512";
    case CpuIsa::avx512_bf16:
      return "avx512_bf16";
    case CpuIsa::amx:
      return "amx";
  }
  throw std::logic_error("name(CpuIsa): unknown ISA");
}

CpuIsa cpu_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(choose());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<CpuIsa>(isa);
}

void set_cpu_isa(const std::string& name) {
  const CpuIsa isa = name == "auto" ? choose() : parse(name, "the ISA");
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

std::vector<CpuIsa> supported_isas() {
  static const std::vector<CpuIsa> found = [] {
    std::vector<CpuIsa> isas;
    for (CpuIsa isa : kAll)
      if (is_compiled(isa) && machine_has(isa)) isas.push_back(isa);
    return isas;
  }();
  return found;
}

std::vector<CpuIsa> left_out_isas() {
  std::vector<CpuIsa> isas;
  for (CpuIsa isa : kAll)
    if (isa > supported_isas().back() && machine_has(isa)) isas.push_back(isa);
  return isas;
}

}  // namespace pyengine
