// The backward of causal attention, on the tensor cores of Hopper.
#pragma once
#include <stdint.h>

namespace ngf {

// A tensor (B, H, T, 64) in half precision; the last stride is 1, the others are in elements.
struct Heads {
  void* data;
  int64_t stride_b, stride_h, stride_t;
};

struct AttentionBackward {
  bool bf16;                            // all matrices bf16, otherwise all fp16
  Heads q, k, v, grad, out;             // grad: the gradient of `out`
  const float* lse;                     // (B, H, T), log2 of the sum of the exponentials of a query's scores
  Heads dq, dk, dv;
  float* terms;                         // scratch: (B, H, T rounded up to 128, 2)
  int* taken;                           // scratch: (2)
  int B, H, T;
  float scale, scale2;                  // the scores' scale, and scale * log2(e)
};

// Launches on `stream` of device number `device`, of compute capability 9.0. Strides must be multiples of 8, addresses of 16. Throws
// std::runtime_error with CUDA's message.
void attention_backward_sm90(const AttentionBackward& call, int device, void* stream);

}  // namespace ngf
