// c = a b in fp32 on AMX tiles, which multiply bf16: each number is split into three.
//
//     x = x0 + x1 + x2,   x0 = bf16(x), x1 = bf16(x - x0), x2 = bf16(x - x0 - x1)
//     x y ~ x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0)
//
// Three times 8 bits are fp32's 24, so the three parts are exact, and the terms left out of a product are under 2^-26 of it: less than fp32's
// own rounding. Products of bf16 numbers are exact in fp32, and sums are fp32, so the result is at least as close to the true one as with
// fp32 multiply-adds; tests/ops/test_linear_cpu.py checks this. It takes six times as many products, but the tiles compute them twelve times as
// fast as AVX-512 computes fp32 products. (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
// higher-precision computations", 2019.)
//
// Differences from fp32: a part below 1.2e-38 counts as 0, so numbers below 1e-33 have fewer digits; infinity gives NaN, as do numbers from
// 3.39e38 on, which bf16 rounds to infinity.
//
// The loops, from the outside in: all threads split the operand of c's shorter side into parts once, up to 1,024 rows or 768 columns, and
// share out the longer side. A thread splits a piece of its own operand. Panels of b, 1.2 MB, stay in the L2 cache while they are multiplied
// with one panel of a after the other. (Pieces of that panel that fit the L1 cache, and prefetching the sums, made no difference.)
#include "amx/gemm.h"
#include "amx/gemm_blocks.h"
#include "team.h"

#ifdef NGF_AMX

namespace ngf {
namespace {

constexpr int64_t PARTS = 3;
constexpr int64_t STEP = PARTS * 2 * TILE; // elements of a panel for one step in K: two tiles for each part
constexpr int64_t FAR = 8;                 // steps in K whose panels stay in the L2 cache
constexpr int64_t WIDE = 24;               // panels of b that stay there
constexpr int64_t TALL = 32;               // panels of a whose sums are kept for the next piece in K: 3 MB
constexpr int64_t DEEP = 48;               // steps in K of the operand that threads share: at most 9.4 MB

// An operand. Its lines are the rows of a, or the columns of b. Line i at depth k is data[i * line + k * deep]; one of the two strides is 1.
// Elements beyond its lines and depth are read as 0.
struct Lines {
  const float* data;
  int64_t line, deep, lines, depth;
};

NGF_AVX512 inline __m512 first_half(__m512i bf16) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16)), 16);
}

// Splits v0 and v1 into parts: each has v0's 16 numbers, then v1's.
NGF_AVX512 inline void split(__m512 v0, __m512 v1, __m512i* part) {
  for (int64_t p = 0; p < PARTS; ++p) {
    part[p] = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
    v0 = _mm512_sub_ps(v0, first_half(part[p]));
    v1 = _mm512_sub_ps(v1, first_half(_mm512_castsi256_si512(_mm512_extracti64x4_epi64(part[p], 1))));
  }
}

// 16 lines from i and 32 numbers in K from k, in parts; each part is 16 x 16 pairs of neighbours in K. True: each row is a line; false: each
// row is a pair. It prefetches the same place of the next panel, since contiguous pieces are too short for the hardware prefetcher.
NGF_AVX512 inline bool load_parts(const Lines& s, int64_t i, int64_t k, __m512i (*r)[SIDE]) {
  __m512i part[PARTS];
  if (s.deep == 1) {
    const __mmask16 low = first_of_16(s.depth - k), high = first_of_16(s.depth - k - SIDE);
    for (int64_t j = 0; j < SIDE; ++j) {
      const bool there = i + j < s.lines;
      const float* const at = s.data + (i + j) * s.line + k;
      __builtin_prefetch(at + PANEL * s.line);
      __builtin_prefetch(at + PANEL * s.line + SIDE);
      split(_mm512_maskz_loadu_ps(there ? low : 0, at), _mm512_maskz_loadu_ps(there ? high : 0, at + SIDE), part);
      for (int64_t p = 0; p < PARTS; ++p) r[p][j] = part[p];
    }
    return true;
  }
  const __mmask16 mask = first_of_16(s.lines - i);
  for (int64_t j = 0; j < SIDE; ++j) {
    const int64_t row = k + 2 * j;
    const float* const at = s.data + row * s.deep + i;
    __builtin_prefetch(at + PANEL);
    __builtin_prefetch(at + s.deep + PANEL);
    split(_mm512_maskz_loadu_ps(row < s.depth ? mask : 0, at), _mm512_maskz_loadu_ps(row + 1 < s.depth ? mask : 0, at + s.deep), part);
    for (int64_t p = 0; p < PARTS; ++p) r[p][j] = _mm512_permutexvar_epi16(halves_in_turn(), part[p]);
  }
  return false;
}

// Packs 32 lines from i, `steps` steps from k, as a panel at `to`. Each row of a tile is a line in a left operand, a pair in a right one.
NGF_AVX512 void pack(const Lines& s, bool left, int64_t i, int64_t k, int64_t steps, uint16_t* to) {
  __m512i r[PARTS][SIDE];
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t half = 0; half < 2; ++half) {
      const bool by_line = load_parts(s, i + half * SIDE, k + step * DEPTH, r);
      for (int64_t p = 0; p < PARTS; ++p) {
        if (by_line != left) transpose(r[p]);
        for (int64_t j = 0; j < SIDE; ++j) _mm512_store_si512(to + step * STEP + (2 * p + half) * TILE + j * DEPTH, r[p][j]);
      }
    }
}

// sums (32, 32) = left . right over `steps` steps: first the five products of smaller parts, whose sums and rounding errors are small, then
// the product of the largest parts. Adding all six at each step would round six times as often at the size of the whole sum.
NGF_TILES inline void multiply_parts(const uint16_t* left, const uint16_t* right, int64_t steps, float* sums) {
  load_sums(sums, true);
#define NGF_LEFT(part) _tile_loadd(4, l + 2 * part * TILE, 64); _tile_loadd(5, l + (2 * part + 1) * TILE, 64)
#define NGF_RIGHT(part) _tile_loadd(6, r + 2 * part * TILE, 64); _tile_loadd(7, r + (2 * part + 1) * TILE, 64)
#define NGF_MULTIPLY _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)
  const uint16_t *l = left, *r = right;
  for (int64_t s = 0; s < steps; ++s, l += STEP, r += STEP) {        // a loaded part serves all products that need it
    NGF_LEFT(2); NGF_RIGHT(0); NGF_MULTIPLY;
    NGF_LEFT(1); NGF_MULTIPLY;
    NGF_RIGHT(1); NGF_MULTIPLY;
    NGF_LEFT(0); NGF_MULTIPLY;
    NGF_RIGHT(2); NGF_MULTIPLY;
  }
  l = left, r = right;
  for (int64_t s = 0; s < steps; ++s, l += STEP, r += STEP) {
    NGF_LEFT(0); NGF_RIGHT(0); NGF_MULTIPLY;
  }
#undef NGF_LEFT
#undef NGF_RIGHT
#undef NGF_MULTIPLY
  store_sums(sums);
}

NGF_AVX512 inline void add(const float* more, float* sums) {
  for (int64_t i = 0; i < SUMS; i += SIDE) _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(more + i)));
}

// Panels of a or of b from `begin` to `end`.
struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// A block of c over the steps in K of `depth`. One operand, a if `shared_a`, otherwise b, is already packed in `shared`, from its first panel
// and the first step of `depth` on. The other is packed here.
void product_block(const Product& g, const Lines& a, const Lines& b, Range rows, Range columns, Range depth, const uint16_t* shared,
                   bool shared_a, TileMemory& memory) {
  const Pieces far(depth.count(), FAR);
  const int64_t of_shared = depth.count() * STEP, of_own = far.length * STEP, own_panels = shared_a ? columns.count() : 1;
  const int64_t to_keep = SUMS * columns.count() * (far.count() > 1 ? rows.count() : 1);
  uint16_t* const own = memory.get<uint16_t>(own_panels * of_own + 2 * (to_keep + SUMS));
  float *const kept = (float*)(own + own_panels * of_own), *const more = kept + to_keep;
  for (int64_t f = 0; f < far.count(); ++f) {
    const int64_t begin = far.begin(f), length = far.end(f) - begin, k = (depth.begin + begin) * DEPTH;
    for (int64_t p = 0; shared_a && p < columns.count(); ++p) pack(b, false, (columns.begin + p) * PANEL, k, length, own + p * of_own);
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      if (!shared_a) pack(a, true, m * PANEL, k, length, own);
      const uint16_t* const left = shared_a ? shared + (m - rows.begin) * of_shared + begin * STEP : own;
      float* const sums = kept + (far.count() > 1 ? (m - rows.begin) * columns.count() * SUMS : 0);
      const bool last = f + 1 == far.count();
      for (int64_t p = 0; p < columns.count(); ++p) {
        const uint16_t* const right = shared_a ? own + p * of_own : shared + p * of_shared + begin * STEP;
        const int64_t n = (columns.begin + p) * PANEL;
        if (last) claim(g.c + m * PANEL * g.columns + n, 4 * g.columns, std::min(PANEL, g.rows - m * PANEL), 2);
        multiply_parts(left, right, length, f == 0 ? sums + p * SUMS : more);
        if (f > 0) add(more, sums + p * SUMS);
        if (last)
          write_fp32(sums + p * SUMS, depth.begin ? nullptr : g.bias, m * PANEL, g.rows, n, g.columns, depth.begin > 0, false, g.c);
      }
    }
  }
}

}  // namespace

void product_fp32(const Product& g, int threads) {
  check_amx();
  if (g.rows == 0 || g.columns == 0) return;
  threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, g.rows * g.depth * g.columns >> 21));   // worthwhile from about 10 us of work on
  const Lines a{g.a, g.a_row, g.a_column, g.rows, g.depth}, b{g.b, g.b_column, g.b_row, g.columns, g.depth};
  const bool shared_a = g.rows < g.columns;
  const Lines& to_share = shared_a ? a : b;
  const Pieces ours(up(to_share.lines, PANEL), shared_a ? TALL : WIDE), deep(up(g.depth, DEPTH), DEEP);
  const Pieces theirs = shared_out(up((shared_a ? b : a).lines, PANEL), shared_a ? WIDE : TALL, threads);
  static thread_local TileMemory memory;
  for (int64_t o = 0; o < ours.count(); ++o)
    for (int64_t d = 0; d < deep.count(); ++d) {
      const Range side{ours.begin(o), ours.end(o)}, depth{deep.begin(d), deep.end(d)};
      uint16_t* const shared = memory.get<uint16_t>(side.count() * depth.count() * STEP);
      Shares packing(side.count(), threads), shares(theirs.count(), threads);
      on_team(threads, [&](int member) {
        for (int64_t i; packing.take(member, i);)
          pack(to_share, shared_a, (side.begin + i) * PANEL, depth.begin * DEPTH, depth.count(), shared + i * depth.count() * STEP);
      });
      on_team(threads, [&](int member) {
        static thread_local TileMemory own;
        with_tiles([&] {
          for (int64_t i; shares.take(member, i);) {
            const Range piece{theirs.begin(i), theirs.end(i)};
            product_block(g, a, b, shared_a ? side : piece, shared_a ? piece : side, depth, shared, shared_a, own);
          }
        });
      });
    }
}

}  // namespace ngf

#else

namespace ngf {
void product_fp32(const Product&, int) { throw std::runtime_error("the extension was built without AMX"); }
}  // namespace ngf

#endif
