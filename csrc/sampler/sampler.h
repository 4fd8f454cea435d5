// The C++ interface of the two samplers: plain pointers in, tokens out. definition.h defines what they compute.
#pragma once
#include <stdint.h>

namespace ngf {

enum class LogitType { fp32, bf16, fp16 };

// A parameter: one value for all rows, or, where `rows` is not null, one per row (in the memory that holds the logits).
template <class T> struct PerRow {
  const T* rows;
  T value;
};

struct Batch {
  const void* logits;          // (rows, vocab), last dimension contiguous
  LogitType type;
  int64_t rows, vocab;         // vocab 1 .. 262144
  int64_t row_stride;          // in elements
  PerRow<float> temperature;
  PerRow<int64_t> top_k;       // not above 0: off
  PerRow<float> top_p;         // not below 1: off
  PerRow<float> min_p;         // not above 0: off
  const int64_t* seed;         // (rows)
  int64_t* offset;             // (rows); each is incremented: a row's n-th token is drawn at offset n
  int64_t* token;              // (rows), written
};

constexpr int64_t MAX_VOCAB = 262144;  // 2^18 weights of at most 2^40 sum to less than 2^59

// Rows in parallel on up to `threads` threads. `isa`: "baseline", "avx2", "avx512", or "" for the best that runs here (isa.h); the
// tokens are the same. Throws std::invalid_argument for one that this CPU or build lacks.
void sample_cpu(const Batch& batch, int threads, const char* isa);

// One launch on `stream` of device number `device`. Throws std::runtime_error with CUDA's message.
void sample_cuda(const Batch& batch, int device, void* stream);
const char* cuda_why_not(int device);  // "" where the launch can work, otherwise the reason

}  // namespace ngf
