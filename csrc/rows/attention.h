// The steps between the matmuls of attention's backward, for training on the CPU where attention does not run on AMX tiles:
//
//     P = exp(scale * S - lse),   delta = rowsum(P * dP),   dS = scale * P * (dP - delta)
//
// delta equals dO . O, but summed from the same dP it cancels exactly where it should: the gradient of a row that sees one key is 0. dP is in
// fp32, since keys that share a row's weight may have nearly equal ones.
//
// Why it is here: PyTorch's own backward on a CPU multiplies blocks of one head at a time and takes 50 ms of one core for the 2 GFLOP of
// B=4, H=12, T=256, D=64. As matmuls batched over heads these take 5 ms, and everything between them is one pass.
#pragma once
#include <stdint.h>

namespace ngf {

// `heads` x `rows` queries, each with `keys` keys. uint16_t is bf16.
struct AttentionGradient {
  int64_t heads, rows, keys;
  int64_t first;           // row r sees the keys 0 .. first + r
  float scale;
  float* scores;           // (heads, rows, keys) q . k; overwritten with P in fp32
  const float* lse;        // (heads, rows), heads lse_stride apart
  int64_t lse_stride;
  const float* dp;         // (heads, rows, keys): dO V^T
  uint16_t* p;             // (heads, rows, keys), written: P; 0 at keys that a row does not see
  uint16_t* ds;            // (heads, rows, keys), written: dS; 0 at the same keys
};

// Rows in parallel on up to `threads` threads. `isa` as for sample_cpu.
void attention_gradient_cpu(const AttentionGradient& batch, int threads, const char* isa);

// One row of one head: the interface of attention.cpp, which is compiled once per instruction set, to training.cpp.
using AttentionRow = void (*)(const AttentionGradient& batch, int64_t head, int64_t row);
void attention_row_baseline(const AttentionGradient& batch, int64_t head, int64_t row);
void attention_row_avx2(const AttentionGradient& batch, int64_t head, int64_t row);
void attention_row_avx512(const AttentionGradient& batch, int64_t head, int64_t row);

}  // namespace ngf
