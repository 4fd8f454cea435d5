// What lies between the matmuls of attention's backward on the CPU: from scores to weights and to the gradient of the scores.
//
//     P = exp(scale * S - lse),   delta = rowsum(P * dP),   dS = scale * P * (dP - delta)
//
// delta equals dO . O, but summed from the same rounded dP it cancels exactly where it should: a row that sees one key sends nothing back.
//
// Why it is here: PyTorch's own backward on a CPU multiplies blocks of one head at a time and takes 50 ms of one core for the 2 GFLOP
// of B=4, H=12, T=256, D=64. As batched matmuls over heads these are 5 ms, and everything between them is this one pass.
#pragma once
#include <stdint.h>

namespace ngf {

// `heads` x `rows` queries, each against `keys` keys. All tensors of `type` are fp32 or all bf16.
struct AttentionGradient {
  bool bf16;
  int64_t heads, rows, keys;
  int64_t first;           // row r sees the keys 0 .. first + r
  float scale;
  float* scores;           // (heads, rows, keys) q . k; P in fp32 afterwards
  const float* lse;        // (heads, rows); from one head to the next lse_stride
  int64_t lse_stride;
  void* dp;                // (heads, rows, keys): comes as dO V^T, leaves as dS; 0 at keys that a row does not see
  void* p;                 // (heads, rows, keys), written; 0 likewise
};

// Rows in parallel on up to `threads` threads. `isa` as for sample_cpu.
void attention_gradient_cpu(const AttentionGradient& batch, int threads, const char* isa);

// One row of one head, of attention_rows.cpp, which is compiled once per instruction set.
using AttentionRow = void (*)(const AttentionGradient& batch, int64_t head, int64_t row);
void attention_row_baseline(const AttentionGradient& batch, int64_t head, int64_t row);
void attention_row_avx2(const AttentionGradient& batch, int64_t head, int64_t row);
void attention_row_avx512(const AttentionGradient& batch, int64_t head, int64_t row);

}  // namespace ngf
