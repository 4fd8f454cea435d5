// Rows in parallel, and the function for them that this CPU can run: what the files whose rows are independent share.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "sampler.h"
#include "team.h"

namespace ngf {

// The one of three functions that `isa` names ("": the best that this CPU has). Throws std::invalid_argument.
template <class F> F of_isa(const std::string& isa, F avx512, F avx2, F baseline) {
  const std::string available = cpu_isas();                          // best first, separated by blanks
  const std::string wanted = isa.empty() ? available.substr(0, available.find(' ')) : isa;
  if ((" " + available + " ").find(" " + wanted + " ") == std::string::npos)
    throw std::invalid_argument("isa is '" + isa + "'; this CPU and build have: " + available);
  return wanted == "avx512" ? avx512 : wanted == "avx2" ? avx2 : baseline;
}

// row(0) .. row(rows - 1), each an independent piece of `length` elements, on up to `threads` threads. 2^17 elements take some 100 us.
template <class Row> void for_rows(int64_t rows, int64_t length, int threads, const Row& row) {
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>({threads, rows, rows * length / (1 << 17)}));
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, length));  // rows that a thread takes at a time
  Shares shares((rows + grain - 1) / grain, (int)members);
  on_team((int)members, [&](int member) {
    for (int64_t i; shares.take(member, i);)
      for (int64_t r = i * grain; r < std::min(rows, (i + 1) * grain); ++r) row(r);
  });
}

}  // namespace ngf
