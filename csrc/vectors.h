// Sixteen floats at once, for the files that are compiled once per instruction set. They use the vector extension of GCC and Clang,
// which the compiler splits into the registers of the instruction set. No standard library: see sampler/cpu_row.h.
#pragma once
#include <stdint.h>

#define NGF_JOIN_(a, b) a##b
#define NGF_JOIN(a, b) NGF_JOIN_(a, b)
#define NGF_STRING_(a) #a
#define NGF_STRING(a) NGF_STRING_(a)

extern "C" {
float sqrtf(float);
float logf(float);
}

namespace ngf {
namespace {  // so that each file has its own copies, compiled for its instruction set

constexpr int64_t W = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4)));      // aligned(4): loads need no alignment
typedef int32_t IVec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t UVec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(32), aligned(2)));

inline Vec all(float v) { return Vec{} + v; }

inline Vec load(const float* p) { return *(const Vec*)p; }
inline Vec load(const uint16_t* p) {                                 // bf16 is the upper half of an fp32
  return (Vec)(__builtin_convertvector(*(const Half*)p, UVec) << 16);
}
inline float one(const float* p) { return *p; }
inline float one(const uint16_t* p) {
  union { uint32_t bits; float value; } u = {(uint32_t)*p << 16};
  return u.value;
}

// bf16 by rounding to nearest, ties to even; NaN stays NaN.
inline void store(float* p, Vec v) { *(Vec*)p = v; }
inline void store(uint16_t* p, Vec v) {
  const UVec bits = (UVec)v;
  const UVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
  *(Half*)p = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded, Half);
}
inline void put(float* p, float v) { *p = v; }
inline void put(uint16_t* p, float v) {
  union { float value; uint32_t bits; } u = {v};
  if ((u.bits & 0x7fffffff) > 0x7f800000) *p = (uint16_t)(u.bits >> 16 | 0x40);
  else *p = (uint16_t)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

inline float sum(Vec v) {
  float s[W];
  *(Vec*)s = v;
  for (int64_t n = W / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

// exp to 2 units in the last place: 2^n times a polynomial in the remainder. Below -87 it is 0, which is right for a softmax.
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

}  // namespace
}  // namespace ngf
