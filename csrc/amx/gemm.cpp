// y = x W^T and dW = dy^T x on AMX tiles: gemm.h is the interface, tiles.h packs and multiplies panels.
//
// The tiles reach 2.6 TFLOP/s on one core without any loads, and 2.1 from panels in the L2 cache, if the product is split along K into
// pieces such that one operand's, 16 KB, stays in the L1 cache. So the loops are, from the outside in: threads take blocks of the output; a
// piece of one operand, up to 0.8 MB, is packed into the L2 cache; each 32 rows of the other are read once, in pieces that stay in the L1
// cache while they are multiplied with all packed panels.
#include "amx/gemm.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "amx/gemm_blocks.h"
#include "team.h"

#ifdef NGF_AMX

namespace ngf {
namespace {

constexpr int64_t NEAR = 8;                // steps in K whose panel stays in the L1 cache: 16 KB of 48, beside as much that streams through
constexpr int64_t FAR = 24;                // steps in K whose panels stay in the L2 cache
constexpr int64_t WIDE = 12;               // panels of the outputs that are packed at a time: 0.6 MB of FAR steps
constexpr int64_t FEWEST = 8;              // panels of x that make another packing of W worthwhile
constexpr int64_t TALL = 1024;             // rows of x that are read before the next FAR steps: their sums are 1.6 MB

// Writes sums (32, 32) to y at (m, n). `stream`: bypasses the caches, for data that would leave them before it is read.
NGF_AVX512 void write_bf16(const float* sums, const float* bias, int64_t m, int64_t rows, int64_t n, int64_t columns, bool stream, uint16_t* y) {
  const __mmask32 mask = first_of_32(columns - n);
  const __m512 b0 = bias ? _mm512_maskz_loadu_ps((__mmask16)mask, bias + n) : _mm512_setzero_ps();
  const __m512 b1 = bias ? _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), bias + n + SIDE) : _mm512_setzero_ps();
  for (int64_t i = 0; i < std::min(PANEL, rows - m); ++i) {
    const __m512 low = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL), b0);
    const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL + SIDE), b1);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    uint16_t* const to = y + (m + i) * columns + n;
    if (stream && columns - n >= PANEL && (uintptr_t)to % 64 == 0) _mm512_stream_si512((__m512i*)to, both);
    else _mm512_mask_storeu_epi16(to, mask, both);
  }
}

// Prefetches steps first .. last of rows of x into the L2 cache: 32 rows are on 32 pages, more than the hardware prefetcher tracks.
void fetch(const Linear& g, int64_t top, int64_t bottom, int64_t first, int64_t last) {
  for (int64_t m = top; m < bottom; ++m)
    for (int64_t s = first; s < last; ++s) __builtin_prefetch(g.x + m * g.x_stride + s * DEPTH, 0, 2);
}

// The block of y from row `top` to `bottom`, for panels of W from `first` to `last`. W is packed into `right`; rows of x that can't be read
// in place are packed into `left`.
void linear_block(const Linear& g, int64_t top, int64_t bottom, int64_t first, int64_t last, TileMemory& memory) {
  const int64_t steps = up(g.inputs, DEPTH), wide = last - first;
  const Pieces far(steps, FAR);
  const bool several = far.count() > 1;    // then the sums of all rows are kept for the next piece
  const int64_t panel = far.length * 2 * TILE, tall = std::min(TALL, bottom - top);
  uint16_t* const right = memory.get<uint16_t>(wide * panel + panel + 2 * wide * SUMS * (several ? up(tall, PANEL) : 1));
  uint16_t* const left = right + wide * panel;
  float* const kept = (float*)(left + panel);
  const TileSource w{g.w, g.w_stride, g.w_by_input ? g.inputs : g.outputs, g.w_by_input ? g.outputs : g.inputs};
  const TileSource x{g.x, g.x_stride, g.rows, g.inputs};
  for (int64_t block = top; block < bottom; block += tall)
    for (int64_t f = 0; f < far.count(); ++f) {
      const int64_t begin = far.begin(f), length = far.end(f) - begin;
      if (several || block == top)
        for (int64_t s = 0; s < length; ++s)                         // along K first, since W's rows are long
          for (int64_t p = 0; p < wide; ++p)
            for (int64_t half = 0; half < 2; ++half) {
              const int64_t n = (first + p) * PANEL + half * SIDE, k = (begin + s) * DEPTH;
              uint16_t* const to = right + p * panel + (2 * s + half) * TILE;
              if (g.w_by_input) pack_right(w, k, n, to);
              else pack_right_transposed(w, n, k, to);
            }
      const Pieces near(length, NEAR);
      for (int64_t m = block; m < std::min(block + tall, bottom); m += PANEL) {
        float* const sums = kept + (several ? (m - block) / PANEL * wide * SUMS : 0);
        const bool there = g.inputs % DEPTH == 0 && m + PANEL <= g.rows;
        if (!there)
          for (int64_t s = 0; s < length; ++s)
            for (int64_t half = 0; half < 2; ++half) pack_left(x, m + half * SIDE, (begin + s) * DEPTH, left + (2 * s + half) * TILE);
        for (int64_t c = 0; c < near.count(); ++c) {
          const int64_t s = near.begin(c);
          const LeftPanel rows = there ? rows_as_they_are(g.x + m * g.x_stride + (begin + s) * DEPTH, g.x_stride)
                                       : packed_left(left + s * 2 * TILE);
          for (int64_t p = 0; p < wide; ++p) {
            if (f + 1 == far.count() && c == 0)
              claim(g.y + m * g.outputs + (first + p) * PANEL, 2 * g.outputs, std::min(PANEL, bottom - m), 1);
            if (m + PANEL < bottom)
              fetch(g, m + PANEL + p * PANEL / wide, std::min(bottom, m + PANEL + (p + 1) * PANEL / wide), begin + s, begin + near.end(c));
            multiply(rows, right + p * panel + s * 2 * TILE, near.end(c) - s, f == 0 && c == 0, sums + p * SUMS);
          }
        }
        if (f + 1 == far.count())
          for (int64_t p = 0; p < wide; ++p)
            write_bf16(sums + p * SUMS, g.bias, m, g.rows, (first + p) * PANEL, g.outputs, false, g.y);
      }
    }
}

// The rows of dW in `tall` panels from `first`, and its columns in panel p, from the packed panels of dy and x; `add`: adds to dW.
void weight_gradient_panel(const WeightGradient& g, const uint16_t* left, const uint16_t* right, int64_t steps, int64_t first, int64_t tall,
                           int64_t p, bool add, float* sums) {
  const bool stream = g.outputs * g.inputs >= 1 << 19;               // 2 MB: it would leave the cache before the optimizer reads it
  const Pieces near(steps, NEAR);
  for (int64_t c = 0; c < near.count(); ++c) {
    const int64_t s = near.begin(c);
    for (int64_t m = 0; m < tall; ++m)
      multiply(packed_left(left + (m * steps + s) * 2 * TILE), right + s * 2 * TILE, near.end(c) - s, c == 0, sums + m * SUMS);
  }
  for (int64_t m = 0; m < tall; ++m) {
    if (g.dw_bf16) write_bf16(sums + m * SUMS, nullptr, (first + m) * PANEL, g.outputs, p * PANEL, g.inputs, stream, (uint16_t*)g.dw);
    else write_fp32(sums + m * SUMS, nullptr, (first + m) * PANEL, g.outputs, p * PANEL, g.inputs, add, stream && !add, (float*)g.dw);
  }
}

// A second thread is worthwhile from about 20 us of work on.
int worthwhile(int64_t products, int threads) { return (int)std::max<int64_t>(1, std::min<int64_t>(threads, products >> 23)); }

}  // namespace

bool gemm_works() { return cpu_has("avx512") && amx_works(); }

void linear_cpu(const Linear& g, int threads) {
  check_amx();
  if (g.rows == 0 || g.outputs == 0) return;
  threads = worthwhile(g.rows * g.outputs * g.inputs, threads);
  // Every thread has rows of its own: its rows of x are in its cache, and the next operator gives the same rows of y to the same thread. But
  // a W of many megabytes is packed and read only once, by the thread that has these outputs, unless there are too few outputs for that.
  const int64_t panels = up(g.rows, PANEL);
  const int64_t parts = g.inputs * g.outputs <= 1 << 22 ? threads : up(threads, up(up(g.outputs, PANEL), WIDE));
  const Pieces down(panels, std::max(FEWEST, up(panels, parts)));
  const Pieces across = shared_out(up(g.outputs, PANEL), WIDE, up(threads, down.count()));
  Shares shares(down.count() * across.count(), threads);
  on_team(threads, [&](int member) {
    static thread_local TileMemory memory;
    with_tiles([&] {
      for (int64_t i; shares.take(member, i);) {
        const int64_t m = i / across.count(), n = i % across.count();
        linear_block(g, down.begin(m) * PANEL, std::min(g.rows, down.end(m) * PANEL), across.begin(n), across.end(n), memory);
      }
    });
  });
}

// All threads pack x once, as pairs of rows; the thread that works on some outputs transposes their panels of dy.
void weight_gradient_cpu(const WeightGradient& g, int threads) {
  constexpr int64_t BLOCK = 1024;                                    // rows of one sum
  check_amx();
  if (g.dw_bf16 && g.rows > BLOCK) throw std::invalid_argument("sums of more than 1024 rows are fp32: pieces of them would be rounded");
  if (g.outputs == 0 || g.inputs == 0) return;
  threads = worthwhile(g.rows * g.outputs * g.inputs, threads);
  const int64_t panels = up(g.inputs, PANEL);
  const Pieces down = shared_out(up(g.outputs, PANEL), WIDE, threads);
  static thread_local TileMemory shared;
  for (int64_t block = 0; block < g.rows || block == 0; block += BLOCK) {
    const int64_t rows = std::min(BLOCK, g.rows - block), steps = up(rows, DEPTH), panel = steps * 2 * TILE;
    const TileSource dy{g.dy + block * g.dy_stride, g.dy_stride, rows, g.outputs}, x{g.x + block * g.x_stride, g.x_stride, rows, g.inputs};
    uint16_t* const right = shared.get<uint16_t>(panels * panel);
    Shares packing(steps, threads), shares(down.count(), threads);
    on_team(threads, [&](int member) {
      for (int64_t s; packing.take(member, s);)
        for (int64_t n = 0; n < 2 * panels; ++n) pack_right(x, s * DEPTH, n * SIDE, right + n / 2 * panel + (2 * s + n % 2) * TILE);
    });
    on_team(threads, [&](int member) {
      static thread_local TileMemory own;
      uint16_t* const left = own.get<uint16_t>(down.length * panel + 2 * down.length * SUMS);
      float* const sums = (float*)(left + down.length * panel);
      with_tiles([&] {
        for (int64_t i; shares.take(member, i);) {
          const int64_t first = down.begin(i), tall = down.end(i) - first;
          for (int64_t s = 0; s < steps; ++s)
            for (int64_t m = 0; m < 2 * tall; ++m)
              pack_left_transposed(dy, s * DEPTH, first * PANEL + m * SIDE, left + m / 2 * panel + (2 * s + m % 2) * TILE);
          for (int64_t p = 0; p < panels; ++p) weight_gradient_panel(g, left, right + p * panel, steps, first, tall, p, block > 0, sums);
        }
        _mm_sfence();                                                // streamed stores are visible before the threads report that they are done
      });
    });
  }
}

}  // namespace ngf

#else

namespace ngf {
bool gemm_works() { return false; }
void linear_cpu(const Linear&, int) { throw std::runtime_error("the extension was built without AMX"); }
void weight_gradient_cpu(const WeightGradient&, int) { throw std::runtime_error("the extension was built without AMX"); }
}  // namespace ngf

#endif
