// The backward of causal attention, on the tensor cores of Hopper.
#pragma once
#include <stdint.h>

namespace ngf {

// A tensor (B, H, T, 64) in half precision, the last stride 1; the others in elements.
struct Heads {
  void* data;
  int64_t stride_b, stride_h, stride_t;
};

struct AttentionBackward {
  bool bf16;                            // all matrices bf16, else all fp16
  Heads q, k, v, grad, out;             // grad: the gradient of `out`
  const float* lse;                     // (B, H, T), log2 of the sum of exponentials of a query's scores
  Heads dq, dk, dv;
  float* terms;                         // 2 floats for each of B, H and T rounded up to 128: scratch
  int* taken;                           // 2: scratch
  int B, H, T;
  float scale, scale2;                  // of the scores, and times log2 e
};

// Launches on `stream` of device number `device`, of compute capability 9.0. Strides are multiples of 8, addresses of 16. Throws
// std::runtime_error with CUDA's message.
void attention_backward_sm90(const AttentionBackward& call, int device, void* stream);

}  // namespace ngf
