// Detects the instruction sets of this CPU: see isa.h.
#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#ifdef NGF_X86
#include <cpuid.h>
#endif
#ifdef NGF_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ngf {
namespace {

// Whether NANOGPT_FAST_ISA allows `isa`: it names the best instruction set to use.
bool allowed(const char* isa) {
  static const std::vector<std::string> all = {"amx", "avx512", "avx2", "baseline"};  // best first
  const char* const best = std::getenv("NANOGPT_FAST_ISA");
  if (best == nullptr || *best == 0) return true;
  const auto place = [](const char* name) { return std::find(all.begin(), all.end(), name); };
  if (place(best) == all.end()) throw std::invalid_argument("NANOGPT_FAST_ISA is '" + std::string(best) + "'; expected amx, avx512, avx2 or baseline");
  return place(isa) >= place(best);
}

struct Cpu {
  bool avx2 = false, avx512 = false, amx = false;
};

// What CPUID says, as far as the system saves the registers (XCR0). Not by __builtin_cpu_supports: Zig's runtime answers no to everything.
Cpu cpu() {
  Cpu found;
#ifdef NGF_X86
  unsigned a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
  const bool fma = c & bit_FMA;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const auto saves = [&](unsigned registers) { return (saved & registers) == registers; };
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  constexpr unsigned avx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL, tile = 1u << 24, tile_bf16 = 1u << 22;
  found.avx2 = saves(0x6) && fma && (b & bit_AVX2);
  found.avx512 = saves(0xe6) && (b & avx512) == avx512;
  const bool tiles = (d & (tile | tile_bf16)) == (tile | tile_bf16);
  found.amx = saves(0x600e6) && tiles && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);     // and AVX-512's conversions to bf16
#endif
  return found;
}

}  // namespace

const char* cpu_isas() {
  static const std::string names = [] {
    std::string found;
    if (cpu().avx512 && allowed("avx512")) found += "avx512 ";
    if (cpu().avx2 && allowed("avx2")) found += "avx2 ";
    return found + "baseline";
  }();
  return names.c_str();
}

bool cpu_has(const std::string& isa) { return (std::string(" ") + cpu_isas() + " ").find(" " + isa + " ") != std::string::npos; }

bool amx_works() {
#ifdef NGF_AMX
  static const bool works = [] {
    if (!allowed("amx") || !cpu().amx) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // Linux saves a thread's tiles only for processes that ask for it
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return works;
#else
  return false;
#endif
}

}  // namespace ngf
