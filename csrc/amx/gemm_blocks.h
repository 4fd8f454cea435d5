// Shared by the products on AMX tiles: splitting a matrix into pieces, and writing sums to memory.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "amx/gemm.h"
#include "amx/tiles.h"

namespace ngf {

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `all` split into pieces of nearly the same length, none longer than `most`. Without anything to split there is one empty piece, whose
// sums are 0.
struct Pieces {
  int64_t all, length;
  Pieces(int64_t all, int64_t most) : all(all), length(std::max<int64_t>(1, up(all, std::max<int64_t>(1, up(all, most))))) {}
  int64_t count() const { return std::max<int64_t>(1, up(all, length)); }
  int64_t begin(int64_t i) const { return i * length; }
  int64_t end(int64_t i) const { return std::min(all, (i + 1) * length); }
};

// Panels in equal pieces of at most `most`, their number a multiple of the number of threads.
inline Pieces shared_out(int64_t panels, int64_t most, int64_t threads) {
  return Pieces(panels, std::max<int64_t>(1, up(panels, up(up(panels, most), threads) * threads)));
}

inline void check_amx() {
  if (!gemm_works()) throw std::runtime_error("this CPU has no AMX");
}

#ifdef NGF_AMX
// Writes sums (32, 32) to the fp32 matrix y at (m, n). `add`: adds to y. `stream`: bypasses the caches, for data that would leave them before
// it is read. bias (columns,) or null.
NGF_AVX512 inline void write_fp32(const float* sums, const float* bias, int64_t m, int64_t rows, int64_t n, int64_t columns, bool add,
                                  bool stream, float* y) {
  for (int64_t c = 0; c < PANEL; c += SIDE) {
    const __mmask16 mask = first_of_16(columns - n - c);
    const __m512 more = bias ? _mm512_maskz_loadu_ps(mask, bias + n + c) : _mm512_setzero_ps();
    for (int64_t i = 0; i < std::min(PANEL, rows - m); ++i) {
      float* const to = y + (m + i) * columns + n + c;
      __m512 v = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL + c), more);
      if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to));
      if (stream && mask == 0xffff && (uintptr_t)to % 64 == 0) _mm512_stream_ps(to, v);
      else _mm512_mask_storeu_ps(to, mask, v);
    }
  }
}

// Prefetches cache lines for writing, so that later stores don't wait for memory.
inline void claim(const void* first, int64_t stride, int64_t rows, int64_t lines) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t l = 0; l < lines; ++l) asm volatile("prefetchw %0" : : "m"(*((const char*)first + i * stride + l * 64)));
}
#endif

}  // namespace ngf
