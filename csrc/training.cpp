// The outside of what training has on the CPU, the rows of the cross-entropy and of attention's gradient: checks, instruction set, threads.
#include "attention.h"
#include "cross_entropy.h"
#include "rows.h"

#ifdef NGF_X86
#define NGF_OF_ISA(name, isa) of_isa(isa, name##_avx512, name##_avx2, name##_baseline)
#else
#define NGF_OF_ISA(name, isa) of_isa(isa, name##_baseline, name##_baseline, name##_baseline)
#endif

namespace ngf {

int64_t count_targets(const int64_t* targets, int64_t rows, int64_t vocab, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] == ignore_index) continue;
    if (targets[r] < 0 || targets[r] >= vocab)
      throw std::out_of_range("Target " + std::to_string(targets[r]) + " is out of bounds: expected 0 to " + std::to_string(vocab - 1) +
                              ", or " + std::to_string(ignore_index) + " where the row is to be ignored");
    ++count;
  }
  return count;
}

void cross_entropy_cpu(const LossRows& batch, int threads, const char* isa) {
  const CrossEntropyRow row = NGF_OF_ISA(cross_entropy_row, isa);
  for_rows(batch.rows, batch.vocab, threads, [&](int64_t r) { row(batch, r); });
}

void attention_gradient_cpu(const AttentionGradient& batch, int threads, const char* isa) {
  const AttentionRow row = NGF_OF_ISA(attention_row, isa);
  for_rows(batch.heads * batch.rows, batch.keys, threads, [&](int64_t r) { row(batch, r / batch.rows, r % batch.rows); });
}

}  // namespace ngf
