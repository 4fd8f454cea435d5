// The arithmetic of a decode step. Compiled once per instruction set, with -DNGF_ISA=<name>; vectors are GCC's and Clang's vector
// extension, 16 floats wide, which the compiler cuts to what the instruction set has. No standard library: see cpu_row.h.
//
// A matrix-vector product here is a dot product per output: the weight's row is read front to back, 64 bytes at a time, and meets every
// row of the batch while it is in registers. Four outputs run together, so that four streams are under way.
#include "decode.h"

#define NGF_JOIN_(a, b) a##b
#define NGF_JOIN(a, b) NGF_JOIN_(a, b)
#define NGF_STRING_(a) #a
#define NGF_STRING(a) NGF_STRING_(a)

extern "C" {
float sqrtf(float);
}

namespace ngf {
namespace {

constexpr int64_t W = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4)));      // aligned(4): loaded from anywhere
typedef int32_t IVec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(32), aligned(2)));
typedef uint32_t UVec __attribute__((vector_size(64), aligned(4)));

inline Vec load(const float* p) { return *(const Vec*)p; }
inline Vec load(const uint16_t* p) {                                 // bf16 is the upper half of an fp32
  return (Vec)(__builtin_convertvector(*(const Half*)p, UVec) << 16);
}
inline float one(const float* p) { return *p; }
inline float one(const uint16_t* p) {
  union { uint32_t bits; float value; } u = {(uint32_t)*p << 16};
  return u.value;
}
inline void put(float* p, float v) { *p = v; }
inline void put(uint16_t* p, float v) {                              // to nearest, ties to even; NaN stays NaN
  union { float value; uint32_t bits; } u = {v};
  if ((u.bits & 0x7fffffff) > 0x7f800000) *p = (uint16_t)(u.bits >> 16 | 0x40);
  else *p = (uint16_t)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}
inline Vec all(float v) { return Vec{} + v; }

inline float sum(Vec v) {
  float s[W];
  *(Vec*)s = v;
  for (int64_t n = W / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

// exp to within 2 units in the last place: 2^n times a polynomial in the remainder. Below -87 it is 0, as the softmax wants it.
inline Vec exp_of(Vec x) {
  const IVec tiny = x < -87.0f;
  x = tiny ? all(0.0f) : x;
  const Vec high = x > 88.0f ? all(88.0f) : x;
  const Vec shifted = high * 1.44269504f + 12582912.0f;              // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = shifted - 12582912.0f;
  const Vec r = high - n * 0.693359375f + n * 2.12194440e-4f;        // ln 2 in two parts
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec power = (Vec)((__builtin_convertvector(n, IVec) + 127) << 23);
  return tiny ? all(0.0f) : p * power;
}

// erf by Abramowitz and Stegun, 7.1.26: absolute error 1.5e-7, fp32's own.
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

inline Vec tanh_of(Vec x) {                                          // 1 - 2 / (exp(2x) + 1), from the side where it does not cancel
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

// `OUT` outputs for `ROWS` rows: dot[o][r] = weight row o . x row r.
template <int OUT, int ROWS, class T> void dots(const T* weight, int64_t stride, const float* x, int64_t in, float (*dot)[MAX_DECODE_ROWS]) {
  Vec s[OUT][ROWS] = {};
  int64_t c = 0;
  for (; c + W <= in; c += W) {
    Vec w[OUT];
    for (int o = 0; o < OUT; ++o) {
      w[o] = load(weight + o * stride + c);
      __builtin_prefetch(weight + o * stride + c + 1024 / (int64_t)sizeof(T));
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vec v = load(x + r * in + c);
      for (int o = 0; o < OUT; ++o) s[o][r] += w[o] * v;
    }
  }
  for (int o = 0; o < OUT; ++o)
    for (int r = 0; r < ROWS; ++r) {
      dot[o][r] = sum(s[o][r]);
      for (int64_t i = c; i < in; ++i) dot[o][r] += one(weight + o * stride + i) * x[r * in + i];
    }
}

// All rows of the batch, at most four at a time: 4 x 4 sums and what they need fill the registers of AVX-512.
template <int OUT, class T> void dots_of_rows(const T* weight, int64_t stride, const float* x, int64_t in, int64_t rows,
                                              float (*dot)[MAX_DECODE_ROWS]) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dots<OUT, 4>(weight, stride, x + r * in, in, (float (*)[MAX_DECODE_ROWS])(&dot[0][r]));
  switch (rows - r) {
    case 3: dots<OUT, 3>(weight, stride, x + r * in, in, (float (*)[MAX_DECODE_ROWS])(&dot[0][r])); break;
    case 2: dots<OUT, 2>(weight, stride, x + r * in, in, (float (*)[MAX_DECODE_ROWS])(&dot[0][r])); break;
    case 1: dots<OUT, 1>(weight, stride, x + r * in, in, (float (*)[MAX_DECODE_ROWS])(&dot[0][r])); break;
  }
}

template <class T> void linear_of(const Model& m, const LinearWeights& w, const float* x, int64_t in, float* y, int64_t out, int64_t begin,
                                  int64_t end, bool accumulate, bool activate) {
  const T* weight = (const T*)w.weight;
  const T* bias = (const T*)w.bias;
  float dot[W][MAX_DECODE_ROWS];
  for (int64_t o = begin; o < end; o += W) {                         // 16 outputs: a vector for the activation
    const int64_t n = end - o < W ? end - o : W;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) dots_of_rows<4>(weight + (o + i) * in, in, x, in, m.rows, dot + i);
    for (; i < n; ++i) dots_of_rows<1>(weight + (o + i) * in, in, x, in, m.rows, dot + i);
    for (int64_t r = 0; r < m.rows; ++r) {
      float v[W] = {};
      for (i = 0; i < n; ++i) v[i] = dot[i][r] + (bias ? one(bias + o + i) : 0.0f);
      if (activate) *(Vec*)v = activated(*(const Vec*)v, m.activation);
      float* to = y + r * out + o;
      for (i = 0; i < n; ++i) to[i] = accumulate ? to[i] + v[i] : v[i];
    }
  }
}

void linear(const Model& m, const LinearWeights& w, const float* x, int64_t in, float* y, int64_t out, int64_t begin, int64_t end,
            bool accumulate, bool activate) {
  if (m.type == WeightType::fp32) linear_of<float>(m, w, x, in, y, out, begin, end, accumulate, activate);
  else linear_of<uint16_t>(m, w, x, in, y, out, begin, end, accumulate, activate);
}

template <class T> void remember_as(const Model& m, const LayerWeights& layer, const Activations& a, const int64_t* position, int64_t begin,
                                    int64_t end) {
  const int64_t C = m.width, D = C / m.heads;
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t o = begin < C ? C : begin; o < end; ++o) {
      const int64_t c = o < 2 * C ? o - C : o - 2 * C;               // channel: head c / D, element c % D
      T* cache = (T*)(o < 2 * C ? layer.keys : layer.values);
      put(cache + ((r * m.heads + c / D) * m.context + position[r]) * D + c % D, a.qkv[r * 3 * C + o]);
    }
}

void remember(const Model& m, const LayerWeights& layer, const Activations& a, const int64_t* position, int64_t begin, int64_t end) {
  if (m.type == WeightType::fp32) remember_as<float>(m, layer, a, position, begin, end);
  else remember_as<uint16_t>(m, layer, a, position, begin, end);
}

template <class T> void attend_as(const Model& m, const LayerWeights& layer, const Activations& a, int64_t row, int64_t head, int64_t position,
                                  float* scores) {
  const int64_t C = m.width, D = C / m.heads, n = position + 1;
  const float* q = a.qkv + row * 3 * C + head * D;
  const T* k = (const T*)layer.keys + (row * m.heads + head) * m.context * D;
  const T* v = (const T*)layer.values + (row * m.heads + head) * m.context * D;
  const float scale = 1.0f / sqrtf((float)D);
  float top = -__builtin_inff();
  for (int64_t t = 0; t < n; ++t) {
    Vec s = {};
    int64_t d = 0;
    for (; d + W <= D; d += W) s += load(q + d) * load(k + t * D + d);
    float score = sum(s);
    for (; d < D; ++d) score += q[d] * one(k + t * D + d);
    scores[t] = score *= scale;
    top = score > top ? score : top;
  }
  Vec total = {};
  for (int64_t t = n; t < (n + W - 1) / W * W; ++t) scores[t] = -__builtin_inff();  // the buffer is padded to whole vectors
  for (int64_t t = 0; t < n; t += W) {
    const Vec e = exp_of(load(scores + t) - top);
    *(Vec*)(scores + t) = e;
    total += e;
  }
  const float inverse = 1.0f / sum(total);
  float* y = a.attended + row * C + head * D;
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    Vec s = {};
    for (int64_t t = 0; t < n; ++t) s += scores[t] * load(v + t * D + d);
    *(Vec*)(y + d) = s * inverse;
  }
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
const DecodeKernels NGF_JOIN(decode_kernels_, NGF_ISA) = {NGF_STRING(NGF_ISA), embed, norm, linear, remember, attend};

}  // namespace ngf
