// Detects the instruction sets of this CPU: see isa.h.
#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#ifdef NGF_AMX
#include <cpuid.h>
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

}  // namespace

const char* cpu_isas() {
  static const std::string names = [] {
    std::string found;
#ifdef NGF_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && allowed("avx512")) found += "avx512 ";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2")) found += "avx2 ";
#endif
    return found + "baseline";
  }();
  return names.c_str();
}

bool cpu_has(const std::string& isa) { return (std::string(" ") + cpu_isas() + " ").find(" " + isa + " ") != std::string::npos; }

bool amx_works() {
#ifdef NGF_AMX
  static const bool works = [] {
    unsigned a, b, c, d;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    if (!allowed("amx") || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // Linux saves a thread's tiles only for processes that ask for it
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return works;
#else
  return false;
#endif
}

}  // namespace ngf
