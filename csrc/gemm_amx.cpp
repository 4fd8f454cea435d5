// dW = dy^T x on AMX tiles: see gemm.h. One instruction multiplies 16 x 32 by 32 x 16 bf16 numbers and adds 16 x 16 fp32 sums.
//
// The left tile wants 16 rows (outputs) of 32 neighbours in K, so dy is transposed; the right one wants 16 pairs of rows in K, each with
// its 16 columns (inputs) interleaved. Two left and two right tiles make four products from four loads. A panel, 32 columns of either, is
// 64 KB at 1,024 rows. Four panels of dy stay in the L2 cache while each panel of x comes by once; four at a time also since a row of
// dy is a page or more: one panel alone would look up 1,024 pages to read a line from each.
#include "gemm.h"

#include <cstring>
#include <memory>
#include <stdexcept>

#include "decode.h"  // NGF_AMX, amx_works
#include "rows.h"

#ifdef NGF_AMX
#include <immintrin.h>

#define NGF_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl")))
#define NGF_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

namespace ngf {
namespace {

constexpr int64_t SIDE = 16, DEPTH = 32;   // of a tile: rows or columns, and how far it reaches in K
constexpr int64_t TILE = SIDE * DEPTH;     // elements: 1 KB
constexpr int64_t PANEL = 2 * SIDE;        // columns of dy or x that are worked on together
constexpr int64_t GROUP = 4;               // panels of dy that a thread works on at a time
constexpr int64_t STEPS = 8;               // tiles in K that are multiplied together: 16 KB of x stay in the L1 cache for all of a group
constexpr int64_t BLOCK = 1024;            // rows that are summed in one go

struct alignas(64) Shapes {                // what the tile registers hold, as the instruction reads it: 16 rows of 64 bytes, all eight
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Memory {                            // kept between calls, since fresh pages cost more than filling them
  std::unique_ptr<uint16_t[]> memory;
  int64_t size = 0;

  uint16_t* get(int64_t n) {
    if (n > size) {
      memory.reset(new uint16_t[n + 32]);
      size = n;
    }
    return (uint16_t*)(((uintptr_t)memory.get() + 63) & ~(uintptr_t)63);
  }
};

// 16 columns of rows k and k + 1, interleaved: pair c is {p[k][c], p[k + 1][c]}. What lies beyond the matrix is 0.
NGF_AVX512 inline __m512i pairs(const uint16_t* p, int64_t stride, int64_t k, int64_t rows, __mmask16 columns) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = k < rows ? _mm256_maskz_loadu_epi16(columns, p + k * stride) : zero;
  const __m256i high = k + 1 < rows ? _mm256_maskz_loadu_epi16(columns, p + (k + 1) * stride) : zero;
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

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

// Columns `first` .. of p (rows, columns) as GROUP panels, each `panel` elements: for every 32 rows two tiles, 16 columns each. Transposed
// for the left side.
template <bool LEFT> NGF_AVX512 void pack(const uint16_t* p, int64_t stride, int64_t rows, int64_t columns, int64_t first, int64_t panel,
                                          uint16_t* start) {
  for (int64_t k = 0; k < rows; k += DEPTH)
    for (int64_t c = first; c < first + GROUP * PANEL && c < columns; c += SIDE) {
      uint16_t* const to = start + (c - first) / PANEL * panel + (k / DEPTH * 2 + (c - first) / SIDE % 2) * TILE;
      const int64_t left = columns - c;
      const __mmask16 mask = left >= SIDE ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
      __m512i r[SIDE];
      for (int64_t i = 0; i < SIDE; ++i) r[i] = pairs(p + c, stride, k + 2 * i, rows, mask);
      if (LEFT) transpose(r);
      for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(to + i * DEPTH, r[i]);
    }
}

// sums (32, 32) += left panel . right panel over `steps` tiles in K; `first`: they start at 0.
NGF_TILES void multiply(const uint16_t* left, const uint16_t* right, int64_t steps, bool first, float* sums) {
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
  for (int64_t s = 0; s < steps; ++s, left += 2 * TILE, right += 2 * TILE) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 4 * PANEL);
  _tile_stored(1, sums + SIDE, 4 * PANEL);
  _tile_stored(2, sums + SIDE * PANEL, 4 * PANEL);
  _tile_stored(3, sums + SIDE * PANEL + SIDE, 4 * PANEL);
}

// sums (32, 32) to dW at (m, n); `add` to what is there (fp32 only).
NGF_AVX512 void write(const WeightGradient& g, const float* sums, int64_t m, int64_t n, bool add) {
  for (int64_t i = 0; i < PANEL && m + i < g.outputs; ++i)
    for (int64_t c = n; c < n + PANEL && c < g.inputs; c += SIDE) {
      const int64_t left = g.inputs - c, at = (m + i) * g.inputs + c;
      const __mmask16 mask = left >= SIDE ? 0xffff : (__mmask16)((1u << left) - 1);
      __m512 v = _mm512_loadu_ps(sums + i * PANEL + c - n);
      if (g.dw_bf16) {                                               // to nearest, ties to even; NaN stays NaN
        const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i half = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        half = _mm512_mask_mov_epi32(half, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        _mm256_mask_storeu_epi16((uint16_t*)g.dw + at, mask, _mm512_cvtepi32_epi16(half));
      } else {
        float* const to = (float*)g.dw + at;
        if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to));
        _mm512_mask_storeu_ps(to, mask, v);
      }
    }
}

// Runs `work` with all tiles shaped, and leaves the thread's tiles as they were: the caller's belong to whoever shaped them.
template <class F> NGF_TILES void with_tiles(const F& work) {
  alignas(64) char before[64];
  const Shapes shapes;
  asm volatile("" : : "r"(&shapes) : "memory");                      // GCC's intrinsics say that they touch only the first bytes
  _tile_storeconfig(before);
  _tile_loadconfig(&shapes);
  work();
  asm volatile("" : : "r"(before) : "memory");
  if (before[0]) _tile_loadconfig(before);
  else _tile_release();
}

}  // namespace

bool gemm_works() { return (std::string(" ") + cpu_isas()).find(" avx512") != std::string::npos && amx_works(); }

void weight_gradient_cpu(const WeightGradient& g, int threads) {
  if (!gemm_works()) throw std::runtime_error("this CPU has no AMX");
  if (g.dw_bf16 && g.rows > BLOCK) throw std::invalid_argument("sums of more than 1024 rows are fp32: pieces of them would be rounded");
  // Under a few milliseconds a second thread loses more to PyTorch's own, which go on spinning after each operator, than it saves.
  if (g.rows * g.outputs * g.inputs < (int64_t{1} << 30)) threads = 1;
  constexpr int64_t WIDE = GROUP * PANEL;
  const int64_t left = (g.outputs + WIDE - 1) / WIDE, right = (g.inputs + WIDE - 1) / WIDE;  // groups of panels
  static thread_local Memory shared;
  for (int64_t k = 0; k < g.rows || k == 0; k += BLOCK) {
    const int64_t rows = std::min(BLOCK, g.rows - k), steps = (rows + DEPTH - 1) / DEPTH, panel = steps * 2 * TILE;
    uint16_t* const x = shared.get(right * GROUP * panel);
    for_rows(right, WIDE * rows, threads, [&](int64_t n) {
      pack<false>(g.x + k * g.x_stride, g.x_stride, rows, g.inputs, n * WIDE, panel, x + n * GROUP * panel);
    });
    for_rows(left, WIDE * rows * right, threads, [&](int64_t group) {
      static thread_local Memory own;
      uint16_t* const dy = own.get(GROUP * panel);
      pack<true>(g.dy + k * g.dy_stride, g.dy_stride, rows, g.outputs, group * WIDE, panel, dy);
      with_tiles([&] {
        alignas(64) float sums[GROUP][PANEL * PANEL];
        const int64_t panels = std::min(GROUP, (g.outputs - group * WIDE + PANEL - 1) / PANEL);
        for (int64_t n = 0; n < g.inputs; n += PANEL) {
          for (int64_t s = 0; s < steps; s += STEPS)
            for (int64_t m = 0; m < panels; ++m)
              multiply(dy + m * panel + s * 2 * TILE, x + n / PANEL * panel + s * 2 * TILE, std::min(STEPS, steps - s), s == 0, sums[m]);
          asm volatile("" : : "r"(sums) : "memory");
          for (int64_t m = 0; m < panels; ++m) write(g, sums[m], group * WIDE + m * PANEL, n, k > 0);
        }
      });
    });
  }
}

}  // namespace ngf

#else

namespace ngf {
bool gemm_works() { return false; }
void weight_gradient_cpu(const WeightGradient&, int) { throw std::runtime_error("the extension was built without AMX"); }
}  // namespace ngf

#endif
