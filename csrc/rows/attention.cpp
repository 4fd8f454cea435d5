// One row of attention's weights and of the gradient of its scores. Compiled once per instruction set, with -DNGF_ISA=<name>.
#include "rows/attention.h"
#include "vectors.h"

namespace ngf {

void NGF_JOIN(attention_row_, NGF_ISA)(const AttentionGradient& g, int64_t head, int64_t row) {
  const int64_t at = (head * g.rows + row) * g.keys;
  const int64_t seen = g.first + row + 1 < g.keys ? g.first + row + 1 : g.keys;
  const float lse = g.lse[head * g.lse_stride + row];
  float* s = g.scores + at;
  const float* dp = g.dp + at;
  uint16_t *p = g.p + at, *ds = g.ds + at;
  // With large scores these differ from the forward's weights in more than the last digits. Divided by their own sum they add up to 1.
  Vec sums = {};
  int64_t k = 0;
  for (; k + W <= seen; k += W) {
    const Vec weight = exp_of(load(s + k) * g.scale - lse);
    sums += weight;
    store(s + k, weight);
  }
  float total = sum(sums);
  for (; k < seen; ++k) total += s[k] = exp_of(all(s[k] * g.scale - lse))[0];  // at most 15
  sums = Vec{};
  for (k = 0; k + W <= seen; k += W) {
    const Vec weight = load(s + k) / total;
    sums += weight * load(dp + k);
    store(s + k, weight);
    store(p + k, weight);
  }
  float delta = sum(sums);
  for (; k < seen; ++k) {
    s[k] /= total;
    delta += s[k] * dp[k];
    put(p + k, s[k]);
  }
  for (k = 0; k + W <= seen; k += W) store(ds + k, load(s + k) * (load(dp + k) - delta) * g.scale);
  for (; k < seen; ++k) put(ds + k, s[k] * (dp[k] - delta) * g.scale);
  for (; k < g.keys; ++k) ds[k] = p[k] = 0;
}

}  // namespace ngf
