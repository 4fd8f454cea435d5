// AdamW's step for a piece of a tensor, and the sum of squares of a piece of a gradient. Compiled once per instruction set, with
// -DNGF_ISA=<name>.
#include "rows/adamw.h"
#include "vectors.h"

namespace ngf {
namespace {

// Elements to prefetch ahead, 2 KB: the hardware prefetcher stops at the end of a page, in all four arrays. It saves 12 of 102 ms for GPT-2
// 124M.
constexpr int64_t AHEAD = 512;

inline Vec root_of(Vec v) {
  for (int64_t i = 0; i < W; ++i) v[i] = sqrtf(v[i]);
  return v;
}

// Sixteen elements. `copy` may be null.
inline void move(float* weight, const float* gradient, float* exp_avg, float* exp_avg_sq, uint16_t* copy, const AdamNumbers& n) {
  const Vec g = load(gradient) * n.factor, old = load(exp_avg);
  const Vec m = n.new_m < 0.5f ? old + n.new_m * (g - old) : g - (1 - n.new_m) * (g - old);  // exact at both ends, as torch.lerp
  const Vec v = load(exp_avg_sq) * n.old_v + n.new_v * g * g;
  const Vec w = load(weight) * n.kept - n.rate * m / (root_of(v) / n.root + n.eps);
  store(exp_avg, m);
  store(exp_avg_sq, v);
  store(weight, w);
  if (copy) store(copy, w);
}

}  // namespace

void NGF_JOIN(adamw_piece_, NGF_ISA)(const AdamTensor& tensor, const AdamNumbers& numbers, int64_t begin, int64_t end) {
  const AdamTensor t = tensor;                                       // local copies, which the compiler knows no store changes
  const AdamNumbers n = numbers;
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    __builtin_prefetch(t.weight + i + AHEAD);
    __builtin_prefetch(t.gradient + i + AHEAD);
    __builtin_prefetch(t.exp_avg + i + AHEAD);
    __builtin_prefetch(t.exp_avg_sq + i + AHEAD);
    move(t.weight + i, t.gradient + i, t.exp_avg + i, t.exp_avg_sq + i, t.copy ? t.copy + i : nullptr, n);
  }
  if (i == end) return;
  float weight[W] = {}, gradient[W] = {}, exp_avg[W] = {}, exp_avg_sq[W] = {};
  uint16_t copy[W];
  for (int64_t j = 0; i + j < end; ++j) {
    weight[j] = t.weight[i + j], gradient[j] = t.gradient[i + j], exp_avg[j] = t.exp_avg[i + j], exp_avg_sq[j] = t.exp_avg_sq[i + j];
  }
  move(weight, gradient, exp_avg, exp_avg_sq, copy, n);
  for (int64_t j = 0; i + j < end; ++j) {
    t.weight[i + j] = weight[j], t.exp_avg[i + j] = exp_avg[j], t.exp_avg_sq[i + j] = exp_avg_sq[j];
    if (t.copy) t.copy[i + j] = copy[j];
  }
}

float NGF_JOIN(squares_piece_, NGF_ISA)(const float* p, int64_t size) {
  Vec sums[4] = {};                                                  // of four quarters: 18 ms for GPT-2 124M; one stream takes 21
  const int64_t quarter = size / (4 * W) * W;
  for (int64_t i = 0; i < quarter; i += W) {
    for (int64_t k = 0; k < 4; ++k) {
      __builtin_prefetch(p + k * quarter + i + AHEAD);
      const Vec g = load(p + k * quarter + i);
      sums[k] += g * g;
    }
  }
  float rest = 0;
  for (int64_t i = 4 * quarter; i < size; ++i) rest += p[i] * p[i];
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

}  // namespace ngf
