// The interface of cpu_row.cpp, which is compiled once per instruction set, to cpu.cpp. Files compiled that way use nothing of the
// standard library: the linker might keep their copies of its inline functions, compiled for AVX-512, for the whole program.
#pragma once
#include "sampler/sampler.h"

namespace ngf {

struct Scratch {
  uint32_t* segment;   // (vocab / SEGMENT + 1) the largest key of each segment
  uint32_t* key;       // (vocab) of the candidates
  uint32_t* index;     // (vocab)
  uint64_t* weight;    // (vocab)
};

constexpr int64_t SEGMENT = 32;  // tokens; small enough for a rescan to read little, large enough for few maxima

using SampleRow = void (*)(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);
void sample_row_baseline(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);
void sample_row_avx2(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);
void sample_row_avx512(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);

}  // namespace ngf
