// The backward of causal attention on the packed projection, on the tensor cores of Hopper.
#pragma once
#include <stdint.h>

namespace ngf {

struct AttentionBackward {
  bool bf16;                            // all matrices bf16, else all fp16
  const void* qkv;                      // (B, T, 3 H 64), the last stride 1
  int64_t qkv_stride_b, qkv_stride_t;   // in elements
  const void* grad;                     // (B, T, H 64), the gradient of `out`, the last stride 1
  int64_t grad_stride_b, grad_stride_t;
  const void* out;                      // (B, T, H 64), contiguous
  const float* lse;                     // (B, H, T), log2 of the sum of exponentials of a query's scores
  void* dqkv;                           // (B, T, 3 H 64), contiguous
  float* terms;                         // 2 floats for each of B, H and T rounded up to 128: scratch
  int* taken;                           // 2: scratch
  int B, T, H;
  float scale, scale2;                  // of the scores, and times log2 e
};

// Launches on `stream` of device number `device`, of compute capability 9.0. Strides are multiples of 8, addresses of 16. Throws
// std::runtime_error with CUDA's message.
void attention_backward_sm90(const AttentionBackward& call, int device, void* stream);

}  // namespace ngf
