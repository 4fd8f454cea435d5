// AdamW's step on the CPU: clipping, the moments, the weights and their bf16 copies in one pass over memory; and the gradients' norm.
//
//     g = factor * gradient
//     m = m + (1 - beta1) (g - m)                 v = beta2 v + (1 - beta2) g^2
//     w = (1 - lr decay) w  -  lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)             copy = bf16(w)
//
// Why it is here: the step is bound by memory bandwidth, so its time depends on how often parameters are read and written. PyTorch's
// clipping, fused AdamW and cast are three passes of 8, 28 and 6 bytes a parameter; this is one of 30. The formulas are those of PyTorch's
// fused step (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), and the state is PyTorch's optimizer state.
#pragma once
#include <stdint.h>

namespace ngf {

struct AdamTensor {
  float* weight;
  const float* gradient;
  float *exp_avg, *exp_avg_sq;  // m and v
  float* step;                  // t; this step increments it
  uint16_t* copy;               // the weight in bf16, or null
  int64_t size;
  double lr, beta1, beta2, eps, weight_decay;
};

// The sum of the squares of all elements of all gradients; pieces of 2^15 are summed in fp32, their sums in fp64. Threads and `isa` as
// below.
double gradient_squares_cpu(const float* const* gradients, const int64_t* sizes, int64_t count, int threads, const char* isa);

// All tensors on up to `threads` threads; their number changes no bit. `isa` as for sample_cpu.
void adamw_cpu(const AdamTensor* tensors, int64_t count, float factor, int threads, const char* isa);

// The interface of adamw.cpp, which is compiled once per instruction set, to training.cpp: elements begin .. end - 1 of a tensor.
struct AdamNumbers {  // factors of a tensor's step: computed in fp64, as in PyTorch, and rounded
  float factor, kept;           // the gradient's; the weight's, 1 - lr decay
  float new_m, old_v, new_v;    // 1 - beta1, beta2, 1 - beta2
  float rate, root, eps;        // lr / (1 - beta1^t), sqrt(1 - beta2^t)
};
using AdamPiece = void (*)(const AdamTensor& tensor, const AdamNumbers& numbers, int64_t begin, int64_t end);
void adamw_piece_baseline(const AdamTensor& tensor, const AdamNumbers& numbers, int64_t begin, int64_t end);
void adamw_piece_avx2(const AdamTensor& tensor, const AdamNumbers& numbers, int64_t begin, int64_t end);
void adamw_piece_avx512(const AdamTensor& tensor, const AdamNumbers& numbers, int64_t begin, int64_t end);

using SquaresPiece = float (*)(const float* p, int64_t size);
float squares_piece_baseline(const float* p, int64_t size);
float squares_piece_avx2(const float* p, int64_t size);
float squares_piece_avx512(const float* p, int64_t size);

}  // namespace ngf
