// The GELU-MLP's matmul with the activation in its epilogue, on the tensor cores of Hopper.
#pragma once
#include <stdint.h>

namespace ngf {

struct LinearAct {
  bool bf16, tanh, backward;    // all matrices bf16, otherwise all fp16; GELU by tanh, otherwise by erf
  const void* a;                // (M, K), rows a_stride elements apart
  int64_t a_stride;
  const void* b;                // forward (N, K), backward (K, N)
  void* h;                      // (M, N): written by the forward, unless null; read by the backward
  void* out;                    // (M, N)
  const float* bias;            // forward: (N) or null
  float* column_sums;           // backward: (4 ceil(M / 128), N), each row the sums of `out` over 32 rows, or null
  int M, N, K;
};

// One launch on `stream` of device number `device`, of compute capability 9.0. K (at least 8), N and a_stride must be multiples of 8, addresses
// multiples of 16, those of bias and column_sums multiples of 8. Throws std::runtime_error with CUDA's message.
void linear_act_sm90(const LinearAct& call, int device, void* stream);

}  // namespace ngf
