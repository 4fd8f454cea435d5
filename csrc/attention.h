// Causal attention for training on the CPU: whole on AMX tiles, or what lies between the matmuls of its backward without them.
//
//     P = exp(scale * S - lse),   delta = rowsum(P * dP),   dS = scale * P * (dP - delta)
//
// delta equals dO . O, but summed from the same rounded dP it cancels exactly where it should: a row that sees one key sends nothing back.
//
// Why it is here: PyTorch's own backward on a CPU multiplies blocks of one head at a time and takes 50 ms of one core for the 2 GFLOP
// of B=4, H=12, T=256, D=64. As batched matmuls over heads these are 5 ms, and everything between them is one pass. On tiles nothing of
// the size of the scores ever leaves the caches, and the heads are read and written where they lie.
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

// All heads of packed bf16 (B, T, 3C), C = heads * width: q, k and v side by side. Everything is contiguous.
struct PackedAttention {
  const uint16_t* qkv;
  int64_t batch, tokens, heads, width;   // width: of a head
  float scale;
  float* lse;              // (batch, heads, tokens): log of the sum of exp(scale * S); written by the forward
};

// Where gemm_works() (gemm.h). On up to `threads` threads, whose number changes no bit.
void attention_forward_amx(const PackedAttention& a, uint16_t* out, int threads);                        // out (B, T, C)
void attention_backward_amx(const PackedAttention& a, const uint16_t* dout, uint16_t* dqkv, int threads);  // (B, T, C), (B, T, 3C)

}  // namespace ngf
