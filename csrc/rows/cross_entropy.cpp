// The loss and gradient of one row of logits. Compiled once per instruction set, with -DNGF_ISA=<name>.
#include "rows/cross_entropy.h"
#include "vectors.h"

namespace ngf {
namespace {

constexpr float INFINITE = __builtin_inff();

// The last n < 16 elements as a vector, padded with -inf, which changes neither the maximum nor the sum.
template <class T> inline Vec load_tail(const T* p, int64_t n) {
  float v[W];
  for (int64_t i = 0; i < W; ++i) v[i] = i < n ? one(p + i) : -INFINITE;
  return load(v);
}

template <class T> float maximum(const T* x, int64_t V) {
  Vec a = all(-INFINITE), b = a;                                     // two, so that no load waits for a comparison
  int64_t c = 0;
  for (; c + 2 * W <= V; c += 2 * W) {
    const Vec u = load(x + c), v = load(x + c + W);
    a = u > a ? u : a;
    b = v > b ? v : b;
  }
  for (; c < V; c += W) {
    const Vec u = V - c < W ? load_tail(x + c, V - c) : load(x + c);
    a = u > a ? u : a;
  }
  a = a > b ? a : b;
  float largest = -INFINITE;
  for (int64_t i = 0; i < W; ++i) largest = a[i] > largest ? a[i] : largest;
  return largest;
}

template <class T> float sum_of_exponentials(const T* x, int64_t V, float largest) {
  Vec a = {}, b = {};
  int64_t c = 0;
  for (; c + 2 * W <= V; c += 2 * W) {
    a += exp_of(load(x + c) - largest);
    b += exp_of(load(x + c + W) - largest);
  }
  for (; c < V; c += W) a += exp_of((V - c < W ? load_tail(x + c, V - c) : load(x + c)) - largest);
  return sum(a + b);
}

template <class T> void gradient(const T* x, T* dx, int64_t V, float largest, float factor) {
  int64_t c = 0;
  for (; c + W <= V; c += W) store(dx + c, exp_of(load(x + c) - largest) * factor);
  if (c == V) return;
  const Vec p = exp_of(load_tail(x + c, V - c) - largest) * factor;
  for (int64_t i = 0; c + i < V; ++i) put(dx + c + i, p[i]);
}

template <class T> void row_of(const LossRows& batch, int64_t row) {
  const int64_t V = batch.vocab, target = batch.targets[row];
  const T* x = (const T*)batch.logits + row * batch.row_stride;
  T* dx = batch.dlogits ? (T*)batch.dlogits + row * batch.gradient_stride : nullptr;
  if (target == batch.ignore_index) {
    if (batch.losses) batch.losses[row] = 0;
    for (int64_t c = 0; dx && c < V; ++c) dx[c] = T();
    return;
  }
  const float largest = maximum(x, V), total = sum_of_exponentials(x, V, largest);
  const float below = one(x + target) - largest;                     // kept separate: near 1e4 fp32 can't hold largest + log(total)
  if (batch.losses) batch.losses[row] = logf(total) - below;
  if (!dx) return;
  gradient(x, dx, V, largest, 1 / total);
  put(dx + target, exp_of(all(below))[0] / total - 1);
}

}  // namespace

void NGF_JOIN(cross_entropy_row_, NGF_ISA)(const LossRows& batch, int64_t row) {
  if (batch.bf16) row_of<uint16_t>(batch, row);
  else row_of<float>(batch, row);
}

}  // namespace ngf
