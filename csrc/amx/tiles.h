// AMX tiles (Intel's Sapphire Rapids and later): the layout of matrices for them, and the product of two panels.
//
// One instruction multiplies 16 x 32 by 32 x 16 bf16 numbers and adds the result to 16 x 16 fp32 sums. Its left operand is 16 rows of 32
// neighbours in K, the dimension of the sum; a matrix whose rows run along K has this layout in place. Its right operand is 16 pairs of
// rows in K, interleaved: word c of pair i is {b[2 i][c], b[2 i + 1][c]}. Two left and two right tiles make four products from four loads.
// 32 rows or columns along all of K, which such products cover, are called a panel.
#pragma once
#include <stdint.h>

#include <memory>

#include "isa.h"

#ifdef NGF_AMX
#include <immintrin.h>

#define NGF_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl")))
#define NGF_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace ngf {

constexpr int64_t SIDE = 16, DEPTH = 32;   // of a tile: rows or columns, and its extent in K
constexpr int64_t TILE = SIDE * DEPTH;     // elements: 1 KB
constexpr int64_t PANEL = 2 * SIDE;        // rows or columns
constexpr int64_t SUMS = PANEL * PANEL;    // of the product of two panels, row by row

struct alignas(64) TileShapes {            // all eight tile registers have 16 rows of 64 bytes, in the instruction's format
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The permutation of 32 numbers that takes from both halves in turn: 0, 16, 1, 17, ...
NGF_AVX512 inline __m512i halves_in_turn() {
  return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
}

// Runs `work` with all tiles configured, then restores the thread's earlier tile shapes, which another library may use, with zeros in them.
template <class Work> NGF_TILES void with_tiles(const Work& work) {
  alignas(64) char before[64];
  const TileShapes shapes;
  asm volatile("" : : "r"(&shapes) : "memory");                      // GCC's intrinsics claim to touch only the first bytes
  _tile_storeconfig(before);
  _tile_loadconfig(&shapes);
  work();
  asm volatile("" : : "r"(before) : "memory");
  if (before[0]) _tile_loadconfig(before);
  else _tile_release();
}

// A thread's working memory, kept between calls, since fresh pages cost more than filling them.
struct TileMemory {
  std::unique_ptr<char[]> memory;
  int64_t size = 0;

  template <class T> T* get(int64_t n) {
    const int64_t bytes = n * (int64_t)sizeof(T) + 64;
    if (bytes > size) {
      memory.reset(new char[bytes]);
      size = bytes;
    }
    return (T*)(((uintptr_t)memory.get() + 63) & ~(uintptr_t)63);
  }
};

inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? 0xffffffff : n > 0 ? (1u << n) - 1 : 0; }
inline __mmask16 first_of_16(int64_t n) { return (__mmask16)first_of_32(n < 16 ? n : 16); }

// 16 x 16 words of 32 bits.
NGF_AVX512 inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// A bf16 matrix to pack tiles from. Elements beyond its rows and columns are read as 0.
struct TileSource {
  const uint16_t* data;
  int64_t stride, rows, columns;           // elements from row to row
};

// 16 columns from `c` of rows k and k + 1, interleaved.
NGF_AVX512 inline __m512i row_pair(const TileSource& s, int64_t k, int64_t c) {
  const __m256i zero = _mm256_setzero_si256();
  const __mmask16 mask = first_of_16(s.columns - c);
  const uint16_t* const at = s.data + k * s.stride + c;
  const __m256i low = k < s.rows ? _mm256_maskz_loadu_epi16(mask, at) : zero;
  const __m256i high = k + 1 < s.rows ? _mm256_maskz_loadu_epi16(mask, at + s.stride) : zero;
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Pack 16 x 32 numbers as a tile at `to`: a left or a right operand, from a source whose rows run along K or across it.
NGF_AVX512 inline void pack_right(const TileSource& s, int64_t k, int64_t c, uint16_t* to) {            // source (K, N)
  for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(to + i * DEPTH, row_pair(s, k + 2 * i, c));
}

NGF_AVX512 inline void pack_left(const TileSource& s, int64_t row, int64_t k, uint16_t* to) {           // source (M, K): rows in place
  const __mmask32 mask = first_of_32(s.columns - k);
  for (int64_t i = 0; i < SIDE; ++i)
    _mm512_store_si512(to + i * DEPTH,
                       row + i < s.rows ? _mm512_maskz_loadu_epi16(mask, s.data + (row + i) * s.stride + k) : _mm512_setzero_si512());
}

NGF_AVX512 inline void pack_left_transposed(const TileSource& s, int64_t k, int64_t c, uint16_t* to) {  // source (K, M)
  __m512i r[SIDE];
  for (int64_t i = 0; i < SIDE; ++i) r[i] = row_pair(s, k + 2 * i, c);
  transpose(r);
  for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(to + i * DEPTH, r[i]);
}

NGF_AVX512 inline void pack_right_transposed(const TileSource& s, int64_t row, int64_t k, uint16_t* to) {  // source (N, K)
  __m512i r[SIDE];
  const __mmask32 mask = first_of_32(s.columns - k);
  for (int64_t i = 0; i < SIDE; ++i)
    r[i] = row + i < s.rows ? _mm512_maskz_loadu_epi16(mask, s.data + (row + i) * s.stride + k) : _mm512_setzero_si512();
  transpose(r);
  for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(to + i * DEPTH, r[i]);
}

// The left operand of a product: a packed panel (two tiles for each step in K), or 32 rows of a matrix in place.
struct LeftPanel {
  const uint16_t* data;
  int64_t stride;                          // bytes from row to row of a tile
  int64_t second, step;                    // elements from the first tile to the second, and from step to step
};

inline LeftPanel packed_left(const uint16_t* data) { return {data, 64, TILE, 2 * TILE}; }
inline LeftPanel rows_as_they_are(const uint16_t* data, int64_t stride) { return {data, 2 * stride, SIDE * stride, DEPTH}; }

// Loads the sums (32, 32) of two panels into the first four registers; `first`: sets them to 0.
NGF_TILES inline void load_sums(const float* sums, bool first) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 4 * PANEL);
    _tile_loadd(1, sums + SIDE, 4 * PANEL);
    _tile_loadd(2, sums + SIDE * PANEL, 4 * PANEL);
    _tile_loadd(3, sums + SIDE * PANEL + SIDE, 4 * PANEL);
  }
}

NGF_TILES inline void store_sums(float* sums) {
  _tile_stored(0, sums, 4 * PANEL);
  _tile_stored(1, sums + SIDE, 4 * PANEL);
  _tile_stored(2, sums + SIDE * PANEL, 4 * PANEL);
  _tile_stored(3, sums + SIDE * PANEL + SIDE, 4 * PANEL);
  asm volatile("" : : "r"(sums) : "memory");  // GCC's intrinsics don't declare what they write
}

// sums (32, 32) += left . right over `steps` tiles in K; `first`: sums = left . right.
NGF_TILES inline void multiply(LeftPanel left, const uint16_t* right, int64_t steps, bool first, float* sums) {
  load_sums(sums, first);
  for (int64_t s = 0; s < steps; ++s, left.data += left.step, right += 2 * TILE) {
    _tile_loadd(6, right, 64);
    _tile_loadd(4, left.data, left.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left.data + left.second, left.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, right + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(sums);
}

}  // namespace ngf
#endif
