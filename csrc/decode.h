// One token a row through a whole GPT on the CPU, with the KV cache: what `generate` does between two draws.
//
// Why it is here: a decode step reads every weight once and does two operations with each, so memory bandwidth is its limit. PyTorch's
// matrix-vector products reach half of it, and between them a step spends as long in Python and in starting threads. Here the
// whole step is one call: weights are streamed once for all rows, in fp32 or bf16; activations and sums are fp32.
//
// The arithmetic is nanoGPT's: x = wte[token] + wpe[position]; x += attention(norm(x)); x += mlp(norm(x)); logits = head(norm(x)).
#pragma once
#include <stdint.h>

namespace ngf {

enum class WeightType { fp32, bf16 };
enum class Activation { gelu, gelu_tanh };

// y = W x + b. W (out, in) contiguous, of the model's weight type; b (out) of the same type, or null.
struct LinearWeights {
  const void* weight;
  const void* bias;
};

struct NormWeights {       // fp32; bias may be null
  const float* weight;
  const float* bias;
};

struct LayerWeights {
  NormWeights ln_1, ln_2;
  LinearWeights c_attn, c_proj, c_fc, mlp_proj;
  void* keys;              // (rows, H, T, D) of the weight type
  void* values;
};

struct Model {
  int64_t rows, width, heads, context, vocab;  // C = width, D = width / heads, T = context
  WeightType type;
  Activation activation;
  const float* wte;        // (V, C)
  const float* wpe;        // (T, C)
  NormWeights ln_f;
  LinearWeights head;
  const LayerWeights* layers;
  int64_t n_layer;
};

// What a step works in. fp32, all rows of a buffer contiguous.
struct Activations {
  float* x;                // (rows, C) the residual stream
  float* qkv;              // (rows, 3C)
  float* attended;         // (rows, C)
  float* hidden;           // (rows, 4C)
};

constexpr int64_t MAX_DECODE_ROWS = 16;  // beyond, PyTorch's matrix products reuse a weight from cache as well as this does

// What decode_kernels.cpp, compiled once per instruction set, gives decode.cpp: the part `begin` .. `end` of a stage's output.
struct DecodeKernels {
  const char* isa;
  void (*embed)(const Model&, const Activations&, const int64_t* token, const int64_t* position);
  // h (rows, C) = norm(x)
  void (*norm)(const Model&, const NormWeights&, const float* x, float* h);
  // Outputs begin .. end of a linear layer on in_features inputs, for all rows; `accumulate` adds to y, `activate` applies the activation.
  void (*linear)(const Model&, const LinearWeights&, const float* x, int64_t in_features, float* y, int64_t out_features, int64_t begin,
                 int64_t end, bool accumulate, bool activate);
  // Outputs begin .. end of q, k, v have been computed: put those that are keys or values into the cache.
  void (*remember)(const Model&, const LayerWeights&, const Activations&, const int64_t* position, int64_t begin, int64_t end);
  // Attention of one row and head over positions 0 .. position. scores: (T) of scratch.
  void (*attend)(const Model&, const LayerWeights&, const Activations&, int64_t row, int64_t head, int64_t position, float* scores);
};
extern const DecodeKernels decode_kernels_baseline, decode_kernels_avx2, decode_kernels_avx512;

// logits (rows, V) fp32. token, position (rows); a position is 0 .. T - 1. `isa` as for sample_cpu.
void decode_cpu(const Model& model, const int64_t* token, const int64_t* position, float* logits, int threads, const char* isa);

}  // namespace ngf
