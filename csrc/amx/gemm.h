// The products of a Linear layer and its gradients on AMX tiles: from bf16, with fp32 sums that are rounded once at the end or not at all;
// and from fp32 (product_fp32), each number as three bf16 numbers.
//
//     y = x W^T + b      linear, with W (outputs, inputs) in place
//     dx = dy W          linear, with w_by_input: W^T (inputs, outputs) in place
//     dW = dy^T x        weight_gradient
//
// Why they are here: PyTorch's oneDNN runs some of these shapes on one thread of two, reaches a third of the tiles' peak, and rounds dW to
// bf16 although the optimizer needs fp32.
#pragma once
#include <stdint.h>

namespace ngf {

struct Linear {
  const uint16_t* x;            // (rows, inputs) bf16, rows x_stride elements apart
  const uint16_t* w;            // bf16, rows w_stride apart: (outputs, inputs), or (inputs, outputs) if w_by_input
  int64_t x_stride, w_stride;
  bool w_by_input;
  const float* bias;            // (outputs,) or null
  int64_t rows, inputs, outputs;
  uint16_t* y;                  // (rows, outputs) contiguous bf16, overwritten
};

struct WeightGradient {
  const uint16_t* dy;           // (rows, outputs) bf16, rows dy_stride elements apart
  const uint16_t* x;            // (rows, inputs) bf16
  int64_t dy_stride, x_stride;
  int64_t rows, outputs, inputs;
  void* dw;                     // (outputs, inputs) contiguous, overwritten
  bool dw_bf16;                 // dw is bf16, rounded; otherwise fp32
};

struct Product {                // fp32; element (m, k) of a is a[m * a_row + k * a_column], one of the two strides is 1; b likewise
  const float *a, *b;           // (rows, depth), (depth, columns)
  int64_t a_row, a_column, b_row, b_column;
  const float* bias;            // (columns,) or null
  int64_t rows, depth, columns;
  float* c;                     // (rows, columns) contiguous, overwritten: a b + bias
};

bool gemm_works();              // whether this CPU and build have AMX

// On up to `threads` threads, whose number changes no bit. bf16 results below 1.2e-38 in magnitude become 0, as in oneDNN.
// Throw std::runtime_error where gemm_works() is false.
void linear_cpu(const Linear& g, int threads);
void weight_gradient_cpu(const WeightGradient& g, int threads);
void product_fp32(const Product& g, int threads);    // each number as three bf16 numbers: as exact as fp32 multiply-adds

}  // namespace ngf
