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

#if defined(NGF_X86) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || defined(__clang__) && __has_include(<amxintrin.h>))
#define NGF_AMX  // the compiler (GCC, or Clang, whose header has another name) knows AMX; whether the CPU does, amx_works() says
#endif

// What a step works in. fp32, all rows of a buffer contiguous.
struct Activations {
  float* x;                // (rows, C) the residual stream
  float* qkv;              // (rows, 3C)
  float* attended;         // (rows, C)
  float* hidden;           // (rows, 4C)
};

constexpr int64_t MAX_DECODE_ROWS = 16;  // beyond, PyTorch's matrix products reuse a weight from cache as well as this does

constexpr int64_t MAX_CHUNK = 64;        // outputs
using Dots = float (*)[MAX_DECODE_ROWS]; // dot[o][r]: output begin + o of a chunk, row r, before bias and activation

// What decode_kernels.cpp, compiled once per instruction set, gives decode.cpp.
struct DecodeKernels {
  const char* isa;
  // Outputs of a linear layer that a thread computes at a time. With 768 inputs, 16 outputs are 49 KB of fp32 weights, 2 us: long against
  // taking a chunk, short against a stage; with 3,072 two chunks, this and the next, still fit in an L2 cache.
  int64_t chunk;
  void (*embed)(const Model&, const Activations&, const int64_t* token, const int64_t* position);
  // h (rows, C) = norm(x)
  void (*norm)(const Model&, const NormWeights&, const float* x, float* h);
  // Where `packs`, `dots` takes x (rows, in) not as it is but in bf16, pairs of inputs of all rows side by side: (in / 2, rows, 2).
  bool packs;
  void (*pack)(const Model&, const float* x, int64_t in, uint32_t* packed);
  // The products of outputs begin .. end with all rows of x. `next`: the weights that this thread will probably want then, or null.
  void (*dots)(const Model&, const void* weight, const void* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot);
  // Bias, activation, and into y (rows, out).
  void (*finish)(const Model&, const void* bias, Dots dot, float* y, int64_t out, int64_t begin, int64_t end, bool accumulate, bool activate);
  // Outputs begin .. end of q, k, v have been computed: put those that are keys or values into the cache.
  void (*remember)(const Model&, const LayerWeights&, const Activations&, const int64_t* position, int64_t begin, int64_t end);
  // Attention of one row and head over positions 0 .. position. scores: (T) of scratch.
  void (*attend)(const Model&, const LayerWeights&, const Activations&, int64_t row, int64_t head, int64_t position, float* scores);
};
extern const DecodeKernels decode_kernels_baseline, decode_kernels_avx2, decode_kernels_avx512;

// decode_amx.cpp: `dots` for bf16 weights whose number of inputs is a multiple of 32.
bool amx_works();
void dots_amx(const Model&, const void* weight, const void* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot);

// logits (rows, V) fp32. token, position (rows); a position is 0 .. T - 1. `isa`: one of decode_isas(), or "" for the best that takes
// this model; "amx" is for bf16 and a width that is a multiple of 32.
void decode_cpu(const Model& model, const int64_t* token, const int64_t* position, float* logits, int threads, const char* isa);
const char* decode_isas();               // those that run here, best first, separated by blanks

}  // namespace ngf
