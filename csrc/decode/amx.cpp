// The matrix products of a bf16 decode step on AMX tiles (Intel's Sapphire Rapids and later).
//
// A tile is 16 rows of 64 bytes, and one instruction multiplies two of them. Sixteen outputs and 32 inputs of a weight are such a tile in
// place: 16 rows, `in` elements apart. So the weights are streamed in memory order without repacking, and multiplied with all rows of the
// batch at once. 512 weights take 2 instructions; with vectors, 16 weights take 3 instructions and a share of a horizontal sum. Activations
// are rounded to bf16, as in PyTorch's own bf16 products; sums are fp32.
#include "decode/decode.h"
#include "isa.h"

#ifdef NGF_AMX
#include <immintrin.h>

#define NGF_TILES __attribute__((target("amx-tile,amx-bf16")))  // per function, since a compiler that doesn't know AMX would refuse a flag

namespace ngf {
namespace {

constexpr int64_t TILE = 16;        // rows of a tile; its 64 bytes a row are 32 inputs
constexpr int64_t STEP = 64;        // bytes

struct alignas(64) Shapes {         // the shapes of the tile registers, in the instruction's format
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};          // of a row
  uint8_t rows[16] = {};
};

// Sums in tiles 0 to 3, activations in 4, weights in 5 to 7.
NGF_TILES void shape_tiles(int64_t outputs, int64_t rows) {
  Shapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.rows[tile] = (uint8_t)(tile == 4 ? TILE : outputs);
    shapes.bytes[tile] = (uint16_t)(tile <= 4 ? 4 * rows : STEP);
  }
  asm volatile("" : : "r"(&shapes) : "memory");                      // GCC's intrinsic claims to read only the first bytes
  _tile_loadconfig(&shapes);
}

// Prefetches a tile's bytes of the next weights, which arrive while the tiles before them are multiplied.
inline void fetch(const char*& ahead) {
  for (int64_t line = 0; line < TILE; ++line) __builtin_prefetch(ahead + line * STEP, 0, 2);
  ahead += TILE * STEP;
}

}  // namespace

NGF_TILES void dots_amx(const Model& m, const void* weight, const void* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot) {
  const int64_t stride = 2 * in, width = 4 * m.rows, steps = in / 32;  // in bytes: from output to output, from pair to pair of inputs
  const char* w = (const char*)weight + begin * stride;
  const char* ahead = (const char*)next;
  float* to = dot[0];
  int64_t left = end - begin;
  shape_tiles(TILE, m.rows);
  for (; left >= 4 * TILE; left -= 4 * TILE, w += 4 * TILE * stride, to += 4 * TILE * MAX_DECODE_ROWS) {
    _tile_zero(0);                                                   // four sums, since each product waits 52 cycles for its own sum
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s) {
      const char* const at = w + s * STEP;
      _tile_loadd(4, (const char*)x + s * TILE * width, width);
      _tile_loadd(5, at, stride);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, at + TILE * stride, stride);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, at + 2 * TILE * stride, stride);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, at + 3 * TILE * stride, stride);
      _tile_dpbf16ps(3, 5, 4);
      if (ahead)
        for (int tile = 0; tile < 4; ++tile) fetch(ahead);
    }
    _tile_stored(0, to, 4 * MAX_DECODE_ROWS);
    _tile_stored(1, to + TILE * MAX_DECODE_ROWS, 4 * MAX_DECODE_ROWS);
    _tile_stored(2, to + 2 * TILE * MAX_DECODE_ROWS, 4 * MAX_DECODE_ROWS);
    _tile_stored(3, to + 3 * TILE * MAX_DECODE_ROWS, 4 * MAX_DECODE_ROWS);
  }
  while (left > 0) {                                                 // the rest of a layer whose outputs are not a multiple of 64
    const int64_t outputs = left < TILE ? left : TILE;
    shape_tiles(outputs, m.rows);
    _tile_zero(0);
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(4, (const char*)x + s * TILE * width, width);
      _tile_loadd(5, w + s * STEP, stride);
      _tile_dpbf16ps(0, 5, 4);
    }
    _tile_stored(0, to, 4 * MAX_DECODE_ROWS);
    left -= outputs;
    w += outputs * stride;
    to += outputs * MAX_DECODE_ROWS;
  }
  _tile_release();                                                   // the system doesn't save released registers when it switches threads
}

}  // namespace ngf
#endif
