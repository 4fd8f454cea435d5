// A decode step: one token per row through a whole GPT on the CPU, with the KV cache, as `generate` needs it between two draws.
//
// Why it is here: a decode step reads every weight once and does two operations with each, so memory bandwidth is its limit. PyTorch's
// matrix-vector products reach half of it, and a step spends as long again in Python and in starting threads. Here the whole step is one
// call: weights are streamed once for all rows, in fp32 or bf16; activations and sums are fp32.
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

// A step's buffers: fp32, contiguous.
struct Activations {
  float* x;                // (rows, C) the residual stream
  float* qkv;              // (rows, 3C)
  float* attended;         // (rows, C)
  float* hidden;           // (rows, 4C)
};

constexpr int64_t MAX_DECODE_ROWS = 16;  // with more rows, PyTorch's matrix products reuse a weight from cache as well as this does

constexpr int64_t MAX_CHUNK = 64;        // outputs
using Dots = float (*)[MAX_DECODE_ROWS]; // dot[o][r]: output begin + o of a chunk, row r, before bias and activation

// The interface of kernels.cpp, which is compiled once per instruction set, to decode.cpp.
struct DecodeKernels {
  const char* isa;
  // Outputs of a linear layer that a thread computes at a time. With 768 inputs, 16 outputs are 49 KB of fp32 weights, 2 us: long beside
  // taking a chunk, short beside a stage. With 3,072 inputs, two chunks (the current and the next) still fit an L2 cache.
  int64_t chunk;
  void (*embed)(const Model&, const Activations&, const int64_t* token, const int64_t* position);
  // h (rows, C) = norm(x)
  void (*norm)(const Model&, const NormWeights&, const float* x, float* h);
  // Where `packs` is set, `dots` takes x (rows, in) repacked in bf16, pairs of inputs of all rows side by side: (in / 2, rows, 2).
  bool packs;
  void (*pack)(const Model&, const float* x, int64_t in, uint32_t* packed);
  // The products of outputs begin .. end with all rows of x. `next`: the weights that this thread will probably read after these, or null.
  void (*dots)(const Model&, const void* weight, const void* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot);
  // Add the bias, apply the activation, and write or add to y (rows, out).
  void (*finish)(const Model&, const void* bias, Dots dot, float* y, int64_t out, int64_t begin, int64_t end, bool accumulate, bool activate);
  // Copy those of the outputs begin .. end of q, k, v that are keys or values into the cache.
  void (*remember)(const Model&, const LayerWeights&, const Activations&, const int64_t* position, int64_t begin, int64_t end);
  // Attention of one row and head over positions 0 .. position. scores: (T) of scratch.
  void (*attend)(const Model&, const LayerWeights&, const Activations&, int64_t row, int64_t head, int64_t position, float* scores);
};
extern const DecodeKernels decode_kernels_baseline, decode_kernels_avx2, decode_kernels_avx512;

// `dots` on AMX tiles (amx.cpp), for bf16 weights whose number of inputs is a multiple of 32.
void dots_amx(const Model&, const void* weight, const void* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot);

// logits (rows, V) fp32. token, position (rows); a position is 0 .. T - 1. `isa`: one of decode_isas(), or "" for the best one for
// this model; "amx" is for bf16 and a width that is a multiple of 32. Throws std::invalid_argument.
void decode_cpu(const Model& model, const int64_t* token, const int64_t* position, float* logits, int threads, const char* isa);
const char* decode_isas();               // those that run here, best first, separated by blanks

}  // namespace ngf
