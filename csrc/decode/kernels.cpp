// The arithmetic of a decode step. Compiled once per instruction set, with -DNGF_ISA=<name>, with the vectors of vectors.h. No standard
// library: see sampler/cpu_row.h.
//
// A matrix-vector product is a dot product per output: the weight's row is read front to back, and multiplied with every row of the batch
// while it is in cache. Four outputs run together. Meanwhile the thread prefetches its next weights in memory order, those of the next
// stage too, since weights depend on nothing: so memory is not idle while threads wait for one another.
#include "decode/decode.h"
#include "vectors.h"

namespace ngf {
namespace {

// Lane i: the sum of two lanes of (a, b), N apart. Four rounds of it reduce 16 vectors to the vector of their sums.
template <int N> inline Vec pairs_added(Vec a, Vec b) {
#ifdef __clang__
#define NGF_FROM(i) (i) / N * 2 * N + (i) % N
#define NGF_SHUFFLE(d) __builtin_shufflevector(a, b, NGF_FROM(0) + d, NGF_FROM(1) + d, NGF_FROM(2) + d, NGF_FROM(3) + d, NGF_FROM(4) + d, \
    NGF_FROM(5) + d, NGF_FROM(6) + d, NGF_FROM(7) + d, NGF_FROM(8) + d, NGF_FROM(9) + d, NGF_FROM(10) + d, NGF_FROM(11) + d, \
    NGF_FROM(12) + d, NGF_FROM(13) + d, NGF_FROM(14) + d, NGF_FROM(15) + d)
  return NGF_SHUFFLE(0) + NGF_SHUFFLE(N);
#else
  constexpr IVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  constexpr IVec from = lane / N * (2 * N) + lane % N;
  return __builtin_shuffle(a, b, from) + __builtin_shuffle(a, b, from + N);
#endif
}

// Lane i: the sum of s[i].
inline Vec sums(const Vec (&s)[W]) {
  Vec a[8], b[4];
  for (int i = 0; i < 8; ++i) a[i] = pairs_added<8>(s[2 * i], s[2 * i + 1]);
  for (int i = 0; i < 4; ++i) b[i] = pairs_added<4>(a[2 * i], a[2 * i + 1]);
  return pairs_added<1>(pairs_added<2>(b[0], b[1]), pairs_added<2>(b[2], b[3]));
}

// erf by Abramowitz and Stegun, 7.1.26: absolute error 1.5e-7, about fp32's own.
inline Vec erf_of(Vec x) {
  const Vec a = x < 0.0f ? -x : x;
  const Vec t = 1.0f / (1.0f + 0.3275911f * a);
  Vec p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec e = 1.0f - p * t * exp_of(-a * a);
  return x < 0.0f ? -e : e;
}

inline Vec tanh_of(Vec x) {                                          // by exp(-2 |x|), which does not cancel
  const Vec a = x < 0.0f ? -x : x;
  const Vec e = exp_of(-2.0f * a);
  const Vec t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

inline Vec activated(Vec x, Activation activation) {
  if (activation == Activation::gelu) return 0.5f * x * (1.0f + erf_of(x * 0.70710678f));
  return 0.5f * x * (1.0f + tanh_of(0.79788456f * (x + 0.044715f * x * x * x)));
}

// ---------------------------------------------------------------- stages

void embed(const Model& m, const Activations& a, const int64_t* token, const int64_t* position) {
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t c = 0; c < m.width; ++c) a.x[r * m.width + c] = m.wte[token[r] * m.width + c] + m.wpe[position[r] * m.width + c];
}

void norm(const Model& m, const NormWeights& w, const float* x, float* h) {
  const int64_t C = m.width;
  for (int64_t r = 0; r < m.rows; ++r, x += C, h += C) {
    Vec s = {};
    int64_t c = 0;
    float mean = 0, square = 0;
    for (; c + W <= C; c += W) s += load(x + c);
    for (; c < C; ++c) mean += x[c];
    mean = (mean + sum(s)) / C;
    s = Vec{};
    for (c = 0; c + W <= C; c += W) {                                // a second pass: E[x^2] - mean^2 would cancel
      const Vec d = load(x + c) - mean;
      s += d * d;
    }
    for (; c < C; ++c) square += (x[c] - mean) * (x[c] - mean);
    const float rstd = 1.0f / sqrtf((square + sum(s)) / C + 1e-5f);
    for (c = 0; c < C; ++c) h[c] = (x[c] - mean) * rstd * w.weight[c] + (w.bias ? w.bias[c] : 0.0f);
  }
}

// `OUT` outputs for `ROWS` rows: dot[o][r] = weight row o . x row r. Prefetches as many bytes of `ahead` as it reads, front to back.
template <int OUT, int ROWS, class T> void dots_of(const T* weight, const float* x, int64_t in, const char* ahead, Dots dot) {
  static_assert(OUT * ROWS <= W, "the sums are one vector");
  constexpr int64_t LINE = 64 / sizeof(T);
  Vec s[W] = {};                                                     // of output o and row r in o * ROWS + r
  int64_t c = 0;
  for (; c + W <= in; c += W) {
    Vec w[OUT];
    for (int o = 0; o < OUT; ++o) w[o] = load(weight + o * in + c);
    if (ahead && c % LINE == 0)
      for (int o = 0; o < OUT; ++o, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    for (int r = 0; r < ROWS; ++r) {
      const Vec v = load(x + r * in + c);
      for (int o = 0; o < OUT; ++o) s[o * ROWS + r] += w[o] * v;
    }
  }
  const Vec total = sums(s);
  for (int o = 0; o < OUT; ++o)
    for (int r = 0; r < ROWS; ++r) {
      dot[o][r] = total[o * ROWS + r];
      for (int64_t i = c; i < in; ++i) dot[o][r] += one(weight + o * in + i) * x[r * in + i];
    }
}

// Four outputs (or one) for all rows of the batch: 16 sums and their operands fill the registers of AVX-512.
template <int OUT, class T> void dots_of_rows(const T* weight, const float* x, int64_t in, int64_t rows, const char* ahead, Dots dot) {
  constexpr int SOME = OUT < 2 ? OUT : 2;
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8, ahead = nullptr)
    for (int o = 0; o < OUT; o += SOME)
      dots_of<SOME, 8>(weight + o * in, x + r * in, in, ahead ? ahead + o * in * sizeof(T) : nullptr, (Dots)&dot[o][r]);
  for (; r + 4 <= rows; r += 4, ahead = nullptr) dots_of<OUT, 4>(weight, x + r * in, in, ahead, (Dots)&dot[0][r]);
  switch (rows - r) {
    case 3: dots_of<OUT, 3>(weight, x + r * in, in, ahead, (Dots)&dot[0][r]); break;
    case 2: dots_of<OUT, 2>(weight, x + r * in, in, ahead, (Dots)&dot[0][r]); break;
    case 1: dots_of<OUT, 1>(weight, x + r * in, in, ahead, (Dots)&dot[0][r]); break;
  }
}

template <class T> void dots_as(const Model& m, const void* weights, const float* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot) {
  const T* weight = (const T*)weights + begin * in;
  const char* ahead = (const char*)next;
  int64_t o = 0;
  for (; o + 4 <= end - begin; o += 4) dots_of_rows<4>(weight + o * in, x, in, m.rows, ahead ? ahead + o * in * sizeof(T) : nullptr, dot + o);
  for (; o < end - begin; ++o) dots_of_rows<1>(weight + o * in, x, in, m.rows, nullptr, dot + o);
}

void dots(const Model& m, const void* weight, const void* x, int64_t in, int64_t begin, int64_t end, const void* next, Dots dot) {
  if (m.type == WeightType::fp32) dots_as<float>(m, weight, (const float*)x, in, begin, end, next, dot);
  else dots_as<uint16_t>(m, weight, (const float*)x, in, begin, end, next, dot);
}

void pack(const Model& m, const float* x, int64_t in, uint32_t* packed) {
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t p = 0; p < in / 2; ++p) {
      uint16_t pair[2];
      put(pair, x[r * in + 2 * p]);
      put(pair + 1, x[r * in + 2 * p + 1]);
      packed[p * m.rows + r] = (uint32_t)pair[1] << 16 | pair[0];
    }
}

template <class T> void finish_as(const Model& m, const void* biases, Dots dot, float* y, int64_t out, int64_t begin, int64_t end, bool accumulate,
                                  bool activate) {
  const T* bias = (const T*)biases;
  for (int64_t o = begin; o < end; o += W) {
    const int64_t n = end - o < W ? end - o : W;
    Vec b = {};
    if (bias)
      for (int64_t i = 0; i < n; ++i) b[i] = one(bias + o + i);
    for (int64_t r = 0; r < m.rows; ++r) {
      Vec v = b;
      if (n == W)
        for (int64_t i = 0; i < W; ++i) v[i] += dot[o - begin + i][r];
      else
        for (int64_t i = 0; i < n; ++i) v[i] += dot[o - begin + i][r];
      if (activate) v = activated(v, m.activation);
      float* to = y + r * out + o;
      if (n == W) store(to, accumulate ? load(to) + v : v);
      else
        for (int64_t i = 0; i < n; ++i) to[i] = accumulate ? to[i] + v[i] : v[i];
    }
  }
}

void finish(const Model& m, const void* bias, Dots dot, float* y, int64_t out, int64_t begin, int64_t end, bool accumulate, bool activate) {
  if (m.type == WeightType::fp32) finish_as<float>(m, bias, dot, y, out, begin, end, accumulate, activate);
  else finish_as<uint16_t>(m, bias, dot, y, out, begin, end, accumulate, activate);
}

template <class T> void remember_as(const Model& m, const LayerWeights& layer, const Activations& a, const int64_t* position, int64_t begin,
                                    int64_t end) {
  const int64_t C = m.width, D = C / m.heads;
  int64_t n;
  for (int64_t o = begin < C ? C : begin; o < end; o += n) {         // the part of a head's key or value in begin .. end
    const int64_t c = o % C, head = c / D, d = c % D;
    n = D - d < end - o ? D - d : end - o;
    T* const cache = (T*)(o < 2 * C ? layer.keys : layer.values);
    for (int64_t r = 0; r < m.rows; ++r) {
      T* const to = cache + ((r * m.heads + head) * m.context + position[r]) * D + d;
      for (int64_t i = 0; i < n; ++i) put(to + i, a.qkv[r * 3 * C + o + i]);
    }
  }
}

void remember(const Model& m, const LayerWeights& layer, const Activations& a, const int64_t* position, int64_t begin, int64_t end) {
  if (m.type == WeightType::fp32) remember_as<float>(m, layer, a, position, begin, end);
  else remember_as<uint16_t>(m, layer, a, position, begin, end);
}

// The cache of a head is contiguous but short, and the hardware prefetcher starts late. So values are prefetched while keys are read, and
// the next head's keys while values are.
template <class T> inline void fetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

// DV vectors of the result: the values' weighted sum over n positions, reading whole cache lines of a value.
template <int DV, class T> void weighted_sum(const float* weight, const T* v, int64_t n, int64_t D, float inverse, const T* next, float* y) {
  Vec s[2][DV] = {};                                                 // of even and odd positions: twice as many independent sums
  int64_t t = 0;
  for (; t + 2 <= n; t += 2) {
    fetch(next + t * D, 2 * DV * W);
    for (int64_t i = 0; i < 2; ++i)
      for (int d = 0; d < DV; ++d) s[i][d] += weight[t + i] * load(v + (t + i) * D + d * W);
  }
  for (; t < n; ++t)
    for (int d = 0; d < DV; ++d) s[0][d] += weight[t] * load(v + t * D + d * W);
  for (int d = 0; d < DV; ++d) *(Vec*)(y + d * W) = (s[0][d] + s[1][d]) * inverse;
}

template <class T> void attend_as(const Model& m, const LayerWeights& layer, const Activations& a, int64_t row, int64_t head, int64_t position,
                                  float* scores) {
  const int64_t C = m.width, D = C / m.heads, n = position + 1, whole = D / W * W;
  const float* q = a.qkv + row * 3 * C + head * D;
  const T* k = (const T*)layer.keys + (row * m.heads + head) * m.context * D;
  const T* v = (const T*)layer.values + (row * m.heads + head) * m.context * D;
  const float scale = 1.0f / sqrtf((float)D);
  Vec top = all(-__builtin_inff());
  for (int64_t begin = 0; begin < n; begin += W) {                   // sixteen positions, whose scores are one vector
    const int64_t some = n - begin < W ? n - begin : W;
    Vec s[W] = {};
    float rest[W] = {};
    fetch(v + begin * D, W * D);
    for (int64_t t = 0; t < some; ++t) {
      const T* key = k + (begin + t) * D;
      for (int64_t d = 0; d < whole; d += W) s[t] += load(q + d) * load(key + d);
      for (int64_t d = whole; d < D; ++d) rest[t] += q[d] * one(key + d);
    }
    for (int64_t t = some; t < W; ++t) rest[t] = -__builtin_inff();  // the buffer is padded to whole vectors
    const Vec score = (sums(s) + *(const Vec*)rest) * scale;
    *(Vec*)(scores + begin) = score;
    top = score > top ? score : top;
  }
  float largest = top[0];
  for (int64_t i = 1; i < W; ++i) largest = top[i] > largest ? top[i] : largest;
  Vec total = {};
  for (int64_t t = 0; t < n; t += W) {
    const Vec e = exp_of(load(scores + t) - largest);
    *(Vec*)(scores + t) = e;
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  float* y = a.attended + row * C + head * D;
  int64_t d = 0;
  const T* next = k + m.context * D;
  for (; d + 4 * W <= D; d += 4 * W) weighted_sum<4>(scores, v + d, n, D, inverse, next + d, y + d);
  for (; d + W <= D; d += W) weighted_sum<1>(scores, v + d, n, D, inverse, next + d, y + d);
  for (; d < D; ++d) {
    float s = 0;
    for (int64_t t = 0; t < n; ++t) s += scores[t] * one(v + t * D + d);
    y[d] = s * inverse;
  }
}

void attend(const Model& m, const LayerWeights& layer, const Activations& a, int64_t row, int64_t head, int64_t position, float* scores) {
  if (m.type == WeightType::fp32) attend_as<float>(m, layer, a, row, head, position, scores);
  else attend_as<uint16_t>(m, layer, a, row, head, position, scores);
}

}  // namespace

extern const DecodeKernels NGF_JOIN(decode_kernels_, NGF_ISA);
const DecodeKernels NGF_JOIN(decode_kernels_, NGF_ISA) = {NGF_STRING(NGF_ISA), 16, embed, norm, false, pack, dots, finish, remember, attend};

}  // namespace ngf
