// The instruction sets that run here: the CPU and this build have them, and NANOGPT_FAST_ISA, where it is set, allows them.
//
// Not for files that are compiled once per instruction set: see sampler/cpu_row.h.
#pragma once
#include <stdexcept>
#include <string>

#if defined(NGF_X86) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || defined(__clang__) && __has_include(<amxintrin.h>))
#define NGF_AMX  // the compiler knows AMX (GCC, or Clang, whose header has another name); amx_works() says whether the CPU does
#endif

namespace ngf {

const char* cpu_isas();                  // of "avx512", "avx2" and "baseline" those that run here, best first, separated by blanks
bool cpu_has(const std::string& isa);    // one of them
bool amx_works();                        // bf16 products on AMX tiles

// The one of three functions that `isa` names ("": the best that runs here). Throws std::invalid_argument.
template <class F> F of_isa(const std::string& isa, F avx512, F avx2, F baseline) {
  const std::string available = cpu_isas(), wanted = isa.empty() ? available.substr(0, available.find(' ')) : isa;
  if (!cpu_has(wanted)) throw std::invalid_argument("isa is '" + isa + "'; this CPU and build have: " + available);
  return wanted == "avx512" ? avx512 : wanted == "avx2" ? avx2 : baseline;
}

// of_isa for the functions <name>_avx512, <name>_avx2 and <name>_baseline.
#ifdef NGF_X86
#define NGF_OF_ISA(name, isa) of_isa(isa, name##_avx512, name##_avx2, name##_baseline)
#else
#define NGF_OF_ISA(name, isa) of_isa(isa, name##_baseline, name##_baseline, name##_baseline)
#endif

}  // namespace ngf
