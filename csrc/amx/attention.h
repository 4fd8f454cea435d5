// Causal attention for training on AMX tiles, forward and backward: no matrix of scores ever leaves the caches, and the heads are read and
// written in place, in the packed projection.
#pragma once
#include <stdint.h>

namespace ngf {

// All heads of the packed projection (B, T, 3C) in bf16, C = heads * width: q, k and v side by side. Everything is contiguous.
struct PackedAttention {
  const uint16_t* qkv;
  int64_t batch, tokens, heads, width;   // width: of a head
  float scale;
  float* lse;              // (batch, heads, tokens): log of the sum of exp(scale * S); written by the forward
};

// On up to `threads` threads, whose number changes no bit. Throw std::runtime_error where gemm_works() (gemm.h) is false.
void attention_forward_amx(const PackedAttention& a, uint16_t* out, int threads);                        // out (B, T, C)
void attention_backward_amx(const PackedAttention& a, const uint16_t* dout, uint16_t* dqkv, int threads);  // (B, T, C), (B, T, 3C)

}  // namespace ngf
