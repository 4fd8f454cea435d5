// The matrix products of a bf16 decode step on AMX tiles (Intel's Sapphire Rapids and later).
//
// A tile is 16 rows of 64 bytes, and one instruction multiplies two of them. Sixteen outputs and 32 inputs of a weight are such a tile
// where they lie: 16 rows, `in` elements apart. So the weights stream through as they are, in the order in which they lie, and meet
// all rows of the batch at once; what was 3 vector instructions and a share of a horizontal sum for 16 weights is 2 instructions for 512.
// Activations are rounded to bf16, as PyTorch's own bf16 products do; sums are fp32.
#include "decode.h"
#include "sampler.h"

#ifdef NGF_AMX
#include <immintrin.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NGF_TILES __attribute__((target("amx-tile,amx-bf16")))  // by function: what the compiler doesn't know is no flag that it refuses

namespace ngf {
namespace {

constexpr int64_t TILE = 16;        // rows of a tile; its 64 bytes a row are 32 inputs
constexpr int64_t STEP = 64;        // bytes

struct alignas(64) Shapes {         // what the tile registers hold, as the instruction reads it
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
  asm volatile("" : : "r"(&shapes) : "memory");                      // GCC's intrinsic says that it reads only the first bytes
  _tile_loadconfig(&shapes);
}

// As many bytes of what comes next as a tile has: they arrive while the tiles before them are multiplied.
inline void fetch(const char*& ahead) {
  for (int64_t line = 0; line < TILE; ++line) __builtin_prefetch(ahead + line * STEP, 0, 2);
  ahead += TILE * STEP;
}

}  // namespace

bool amx_works() {
  static const bool works = [] {
    unsigned a, b, c, d;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    if (!isa_allowed("amx") || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;      // the kernel keeps a thread's tiles only for those who ask
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return works;
}

NGF_TILES void dots_amx(const Model& m, const void* weight, const void* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot) {
  const int64_t stride = 2 * in, width = 4 * m.rows, steps = in / 32;  // in bytes: from output to output, from pair to pair of inputs
  const char* w = (const char*)weight + begin * stride;
  const char* ahead = (const char*)next;
  float* to = dot[0];
  int64_t left = end - begin;
  shape_tiles(TILE, m.rows);
  for (; left >= 4 * TILE; left -= 4 * TILE, w += 4 * TILE * stride, to += 4 * TILE * MAX_DECODE_ROWS) {
    _tile_zero(0);                                                   // four sums, since one waits 52 cycles for its own last value
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
  while (left > 0) {                                                 // the end of a layer whose outputs are no multiple of 64
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
  _tile_release();                                                   // clean registers cost nothing when the system switches threads
}

}  // namespace ngf
#endif
