// The linear cross-entropy on the CPU between its matmuls: losses and the gradient of the logits from rows of logits.
//
//     loss = log(sum(exp(x))) - x[target],        dx = softmax(x) - onehot(target)
//
// Why it is here: PyTorch casts bf16 logits to fp32, writes a log-softmax of the same size, and its gradient as another; at B=4, T=256,
// V=50,304 that is three times 206 MB of memory traffic. A row of 50,304 bf16 logits is 100 KB and stays in the L2 cache while it is read
// for its maximum, its sum and its gradient, which may overwrite it. So each logit is read from and written to memory once, 2 bytes each.
// Sums are fp32. PyTorch does the matmuls around it (nanogpt_fast/ops/cpu/cross_entropy.py).
#pragma once
#include <stdint.h>

namespace ngf {

struct LossRows {
  const void* logits;      // (rows, vocab), fp32 or bf16, the last dimension contiguous
  void* dlogits;           // of the same shape and type, or `logits` itself, or null where no gradient is wanted
  bool bf16;
  int64_t rows, vocab;
  int64_t row_stride, gradient_stride;   // in elements
  const int64_t* targets;  // (rows), checked by count_targets; for ignore_index, loss and gradient are 0
  int64_t ignore_index;
  float* losses;           // (rows), or null
};

// Rows that are not ignored. Throws std::out_of_range for a target that is neither in 0 .. vocab - 1 nor ignore_index.
int64_t count_targets(const int64_t* targets, int64_t rows, int64_t vocab, int64_t ignore_index);

// Rows in parallel on up to `threads` threads. `isa` as for sample_cpu. A row's bits do not depend on threads or other rows.
void cross_entropy_cpu(const LossRows& batch, int threads, const char* isa);

// One row: the interface of cross_entropy.cpp, which is compiled once per instruction set, to training.cpp.
using CrossEntropyRow = void (*)(const LossRows& batch, int64_t row);
void cross_entropy_row_baseline(const LossRows& batch, int64_t row);
void cross_entropy_row_avx2(const LossRows& batch, int64_t row);
void cross_entropy_row_avx512(const LossRows& batch, int64_t row);

}  // namespace ngf
