// Defines which token is drawn from a row of logits x at temperature t: the arithmetic that the CPU sampler, the CUDA sampler and
// nanogpt_fast/ops/sampler.py (in PyTorch) share, so that all of them draw the same token, bit for bit.
//
//   t not above 0, or nothing in the row above -inf:  the largest value, the lowest index among equals. Otherwise
//   y = (x - max) / t                 in fp32; 0 where x equals max, so that max = +inf is defined; NaN counts as -inf
//   w = round(exp(y) * 2^40)          a 64-bit integer
//   top-k  keeps i when fewer than k values are strictly greater (ties with the k-th stay)
//   top-p  keeps i when the mass of the strictly greater values is less than p times the mass that top-k kept
//   min-p  keeps i when y >= ln(m), applied last
//   r = high 64 bits of (Philox(seed, offset) * kept mass); the token whose cumulative interval, in ascending index, holds r
//
// Why integers: a sum of integers does not depend on its order, so neither threads, tiles, the place in the batch nor the instruction
// set can change a token. And a probability of 2^-40 is resolved; fp32 would never draw a token below 2^-24.
// Why no fused multiply-add: w must be the same with g++, nvcc and PyTorch, and PyTorch has none. Compile with -ffp-contract=off; on
// the GPU, the intrinsics with _rn are never contracted.
#pragma once
#include <stdint.h>
#include <string.h>

#include "sampler/sampler.h"

#ifdef __CUDACC__
#define NGF_INLINE static __host__ __device__ __forceinline__
#else
#define NGF_INLINE static inline __attribute__((always_inline))  // internal linkage: one copy per instruction set, never mixed
#endif

namespace ngf {

template <class T> NGF_INLINE T at(const PerRow<T>& parameter, int64_t row) { return parameter.rows ? parameter.rows[row] : parameter.value; }

// ---------------------------------------------------------------- fp32, never contracted

template <class To, class From> NGF_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#ifdef __CUDA_ARCH__
NGF_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
NGF_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
NGF_INLINE float divide(float a, float b) { return __fdiv_rn(a, b); }
#else
NGF_INLINE float add(float a, float b) { return a + b; }
NGF_INLINE float mul(float a, float b) { return a * b; }
NGF_INLINE float divide(float a, float b) { return a / b; }
#endif

// ---------------------------------------------------------------- logits: fp32, bf16, fp16

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

NGF_INLINE float to_float(float x) { return x; }
NGF_INLINE float to_float(bf16 x) { return bits_as<float>((uint32_t)x.bits << 16); }
NGF_INLINE float to_float(fp16 x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = (uint32_t)(x.bits & 0x7fff) << 13;
  const uint32_t exponent = rest & 0x0f800000;                                  // fp16's five bits, in fp32's position
  const float normal = bits_as<float>(rest + (exponent == 0x0f800000 ? 0x70000000u : 0x38000000u));  // inf/NaN : rebias
  const float small = bits_as<float>(rest + 0x38800000u) - bits_as<float>(0x38800000u);              // 2^-14 + m - 2^-14
  return bits_as<float>(bits_as<uint32_t>(exponent == 0 ? small : normal) | sign);
#endif
}

// ---------------------------------------------------------------- ordered keys

// An unsigned key with the order of the values: keys are equal exactly when values are (-0 equals 0), and NaN has key 0, below -inf.
// All selection uses keys: searches over integers always end, and there are no comparisons with NaN.
constexpr uint32_t KEY_NEGATIVE_INFINITY = 0x007fffff;

NGF_INLINE uint32_t key_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (uint32_t)((int32_t)bits >> 31);   // 0 or all ones
  const uint32_t number = (bits & 0x7fffffff) <= 0x7f800000;                            // 1, or 0 for a NaN
  return ((bits ^ (sign | 0x80000000u)) + (bits == 0x80000000u)) & (0 - number);        // masks instead of branches, so that loops vectorise
}

NGF_INLINE float value_of(uint32_t key) { return bits_as<float>(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu)); }

// ---------------------------------------------------------------- weights

NGF_INLINE float scaled(float x, float max, float temperature) {
  const uint32_t y = bits_as<uint32_t>(divide(x - max, temperature));
  return bits_as<float>(y & (0 - (uint32_t)(x != max)));                       // also a mask: 0 where x equals max
}

// round(exp(y) * 2^40) for y <= 0, NaN as -inf. exp is 2^n * polynomial(y - n ln 2), within 1e-7 of the true value.
// Below -29 the result is 0 (it is below 1/2 from -28.4 on), so clamping there replaces a test for underflow.
NGF_INLINE uint64_t weight_of(float y) {
  y = y > -29.0f ? y : -29.0f;
  // Adding 1.5 * 2^23 leaves the integer nearest to y / ln 2 in the low bits, which is rint in every instruction set.
  const float shifted = add(mul(y, 1.44269504f), 12582912.0f);
  const float n = add(shifted, -12582912.0f);
  const float r = add(add(y, mul(n, -0.693359375f)), mul(n, 2.12194440e-4f));   // ln 2 in two parts, the first product exact
  float p = 0.00138145988f;                                                     // minimax of (exp(r) - 1 - r) / r^2
  p = add(mul(p, r), 0.00836871658f);
  p = add(mul(p, r), 0.0416683890f);
  p = add(mul(p, r), 0.166665211f);
  p = add(mul(p, r), 0.499999940f);
  p = add(mul(p, r), 1.0f);
  p = add(mul(p, r), 1.0f);
  const uint32_t exponent = bits_as<uint32_t>(shifted) - 0x4b400000u + 127 + 40;
  const float w = mul(p, bits_as<float>(exponent << 23));                       // a power of two: exact
#ifdef __CUDA_ARCH__
  return __float2ull_rn(w);
#else
  // The same rounding (nearest, ties to even) without a conversion to 64-bit integers, which AVX2 does not have: adding 2^52 moves
  // the fraction out of a double's mantissa.
  return bits_as<uint64_t>((double)w + 4503599627370496.0) - 0x4330000000000000ull;
#endif
}

// ---------------------------------------------------------------- filters

struct Filter {
  float temperature;
  bool greedy;
  uint32_t k;            // 0: off
  bool nucleus;          // top-p is on
  uint32_t p;            // in units of 2^-32, so that p * mass is exact
  float log_min_p;       // -inf: off
};

// From the user's numbers. Meaningless ones (a NaN, a negative k) turn their filter off, since a captured graph can't raise an error.
// `log_m` is ln of min_p, computed in double and rounded to fp32, for which all libraries agree.
NGF_INLINE Filter make_filter(float temperature, int64_t k, float p, float m, double log_m, int64_t vocab) {
  Filter f;
  f.temperature = temperature;
  f.greedy = !(temperature > 0);
  f.k = k > 0 && k < vocab ? (uint32_t)k : 0;
  f.nucleus = p < 1;
  f.p = p > 0 && p < 1 ? (uint32_t)mul(p, 4294967296.0f) : 0;
  f.log_min_p = m > 0 ? (m < 1 ? (float)log_m : 0.0f) : bits_as<float>(0xff800000u);
  return f;
}

// ceil(p * total / 2^32), at least 1: a token stays in the nucleus exactly when the mass above it is less than this.
// total < 2^59, so no step overflows.
NGF_INLINE uint64_t nucleus_mass(uint32_t p, uint64_t total) {
  const uint64_t mass = p * (total >> 32) + ((p * (total & 0xffffffffu) + 0xffffffffu) >> 32);
  return mass ? mass : 1;
}

// ---------------------------------------------------------------- random numbers

// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): key = seed, counter = offset; the first
// two of its four words. Known answer: key 0, counter 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
NGF_INLINE uint64_t philox(uint64_t seed, uint64_t offset) {
  uint32_t c0 = (uint32_t)offset, c1 = (uint32_t)(offset >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (uint64_t)c1 << 32 | c0;
}

NGF_INLINE uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return (uint64_t)((unsigned __int128)a * b >> 64);
#endif
}

}  // namespace ngf
