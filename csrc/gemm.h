// The gradient of a Linear's weight on AMX tiles (Intel's Sapphire Rapids and later): dW (M, N) = dy^T x, dy (K, M) and x (K, N) bf16.
//
// Why it is here: both operands lie with K, over which the sum goes, in their rows, which is the one layout that oneDNN reorders twice;
// it reaches half the rate of its other products there, and rounds to bf16 what the optimizer wants in fp32. Here x is brought into
// pairs of rows once, dy is transposed 32 columns at a time into the cache, and tiles of 32 x 32 sums go out in fp32.
#pragma once
#include <stdint.h>

namespace ngf {

struct WeightGradient {
  const uint16_t* dy;      // (rows, outputs) bf16, dy_stride elements from row to row
  const uint16_t* x;       // (rows, inputs) bf16
  int64_t dy_stride, x_stride;
  int64_t rows, outputs, inputs;
  void* dw;                // (outputs, inputs) contiguous, overwritten
  bool dw_bf16;            // rounded to bf16; else fp32
};

bool gemm_works();         // whether this CPU and build have AMX

// On up to `threads` threads, whose number changes no bit. Throws std::runtime_error where gemm_works() is false.
void weight_gradient_cpu(const WeightGradient& g, int threads);

}  // namespace ngf
