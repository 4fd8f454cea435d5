// What cpu_row.cpp, compiled once per instruction set, gives cpu.cpp. No type of the standard library crosses or is used there:
// its inline functions, compiled with AVX-512, could be the copies that the linker keeps for everyone.
#pragma once
#include "sampler.h"

namespace ngf {

struct Scratch {
  uint32_t* segment;   // (vocab / SEGMENT + 1) the largest key of each segment
  uint32_t* key;       // (vocab) of the candidates
  uint32_t* index;     // (vocab)
  uint64_t* weight;    // (vocab)
};

constexpr int64_t SEGMENT = 32;  // tokens; small enough that a rescan reads little, large enough that the maxima are few

using SampleRow = void (*)(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);
void sample_row_baseline(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);
void sample_row_avx2(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);
void sample_row_avx512(const Batch& batch, int64_t row, double log_min_p, const Scratch& scratch);

}  // namespace ngf
