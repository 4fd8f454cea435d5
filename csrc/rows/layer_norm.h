// The residual add, LayerNorm and the cast after it, on the CPU: forward and backward in one pass over memory each.
//
//     s = x + branch,   xhat = (s - mean) * rstd,   y = xhat * w + b
//     g = dy * w,       dx = ds + rstd * (g - mean(g) - xhat * mean(g * xhat)),   dbranch = dx
//     dw = sum over rows of dy * xhat,   db = sum over rows of dy
//
// Why it is here: under bf16 autocast PyTorch casts the branch, adds, normalizes and casts back, each in a pass over memory in fp32, and
// its backward adds the stream's gradient, casts the branch's and sums dw in further passes. For 1,024 rows of 768 these read and write
// 21 MB forward and 27 backward; one pass moves 9 and 12. A row stays in the L1 cache, where it is read again for the variance of the
// centred row, which is accurate for rows far from 0, unlike a sum of squares. All sums are fp32.
#pragma once
#include <stdint.h>

namespace ngf {

// Everything is contiguous. x, s, ds and dx share a type, and so do branch and dbranch, and y and dy: bf16 where the flag is set, otherwise
// fp32.
struct LayerNormTypes {
  bool x_bf16, branch_bf16, y_bf16;
};

struct LayerNormForward {
  LayerNormTypes types;
  int64_t rows, width;
  const void* x;
  const void* branch;      // or null: then s is x, and is not written
  const float* weight;     // (width)
  const float* bias;       // (width), or null
  float eps;
  void* s;                 // x + branch, rounded to s's type before it is normalized
  void* y;
  float* mean;             // (rows)
  float* rstd;             // (rows): 1 / sqrt(variance + eps)
};

struct LayerNormBackward {
  LayerNormTypes types;
  int64_t rows, width;
  const void* dy;
  const void* ds;          // s's gradient, or null
  const void* s;
  const float* weight;
  const float* mean;
  const float* rstd;
  void* dx;
  void* dbranch;           // or null
  float* dweight;          // (width)
  float* dbias;            // (width)
};

// Rows in parallel on up to `threads` threads. `isa` as for sample_cpu. The number of threads changes no bit: dweight and dbias are summed
// over blocks of rows that depend on the shape alone, and the blocks' sums are added in order.
void layer_norm_forward_cpu(const LayerNormForward& batch, int threads, const char* isa);
void layer_norm_backward_cpu(const LayerNormBackward& batch, int threads, const char* isa);

// The interface of layer_norm.cpp, which is compiled once per instruction set, to training.cpp: one row forward; and one row backward,
// which adds its part of dweight and dbias to `sums` (2, width).
using LayerNormRow = void (*)(const LayerNormForward& batch, int64_t row);
using LayerNormGradientRow = void (*)(const LayerNormBackward& batch, int64_t row, float* sums);
void layer_norm_row_baseline(const LayerNormForward& batch, int64_t row);
void layer_norm_row_avx2(const LayerNormForward& batch, int64_t row);
void layer_norm_row_avx512(const LayerNormForward& batch, int64_t row);
void layer_norm_gradient_row_baseline(const LayerNormBackward& batch, int64_t row, float* sums);
void layer_norm_gradient_row_avx2(const LayerNormBackward& batch, int64_t row, float* sums);
void layer_norm_gradient_row_avx512(const LayerNormBackward& batch, int64_t row, float* sums);

}  // namespace ngf
