// Eight floats at once, in the compiler's own vector types: one register with AVX2, two without.
//
// Included by one file for each instruction set; all in an unnamed namespace (see kernels.h).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "formats/half.h"
#include "formats/matrix.h"

namespace fettle {
namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(8)));

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
// Not zeros + value, which is an addition and a shuffle where this is one load.
inline Floats all(float value) { return Floats{value, value, value, value, value, value, value, value}; }
inline Ints as_ints(Floats value) {
  Ints bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline Floats as_floats(Ints bits) {
  Floats value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline float sum(Floats v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
inline float largest(Floats v) {
  float top = v[0];
  for (int i = 1; i < 8; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

inline Floats load_bfloat16(const uint16_t* from) {
#if defined(__AVX2__)
  __m128i bits;
  std::memcpy(&bits, from, sizeof bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  Ints wide;
  for (int i = 0; i < 8; ++i) wide[i] = static_cast<int32_t>(static_cast<uint32_t>(from[i]) << 16);
  return as_floats(wide);
#endif
}
inline Floats load_float16(const uint16_t* from) {
#if defined(__F16C__)
  __m128i bits;
  std::memcpy(&bits, from, sizeof bits);
  return _mm256_cvtph_ps(bits);
#else
  Floats value;
  for (int i = 0; i < 8; ++i) value[i] = from_float16(from[i]);
  return value;
#endif
}
inline void store_float16(uint16_t* to, Floats value) {
#if defined(__F16C__)
  const __m128i bits = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &bits, sizeof bits);
#else
  for (int i = 0; i < 8; ++i) to[i] = to_float16(value[i]);
#endif
}
inline Floats load_number(const void* from, Number type, int64_t index) {
  if (type == Number::float32) return load(static_cast<const float*>(from) + index);
  const uint16_t* half = static_cast<const uint16_t*>(from) + index;
  return type == Number::float16 ? load_float16(half) : load_bfloat16(half);
}

// To bfloat16 and back, ties to even; finite numbers only.
inline Floats round_bfloat16(Floats value) {
  const Ints bits = as_ints(value);
  return as_floats((bits + (((bits >> 16) & 1) + 0x7fff)) & static_cast<int32_t>(0xffff0000u));
}
inline Floats round_float16(Floats value) {
  uint16_t bits[8];
  store_float16(bits, value);
  return load_float16(bits);
}
inline Floats round_to(Floats value, Number type) {
  if (type == Number::float32) return value;
  return type == Number::float16 ? round_float16(value) : round_bfloat16(value);
}

// To the nearest whole number, ties to even. Not by adding 1.5 · 2^23 where there are fused multiply-adds: the compiler
// would fuse the addition with the product that is rounded, and another instruction set would give other codes.
inline Ints to_nearest(Floats value) {
#if defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtps_epi32(value));
#elif defined(__aarch64__)
  float32x4_t halves[2];
  std::memcpy(halves, &value, sizeof value);
  const int32x4_t whole[2] = {vcvtnq_s32_f32(halves[0]), vcvtnq_s32_f32(halves[1])};
  Ints result;
  std::memcpy(&result, whole, sizeof result);
  return result;
#else
  const Floats shifter = all(12582912.0f);
  return as_ints(value + shifter) - as_ints(shifter);
#endif
}

// e^x to about 2 units in the last place: 2^n · p(r) with r in ±ln 2 / 2, p by Cephes' expf. Below -87 it is 0.
inline Floats exponential(Floats x) {
  const Ints alive = x > all(-87.0f);
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  const Floats shifter = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
  const Floats whole = (x * 1.44269504088896341f + shifter) - shifter;
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * (rest * rest) + rest + 1.0f;
  const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
  const Floats value = p * as_floats(power);
  return as_floats(as_ints(value) & alive);
}

inline Floats hyperbolic_tangent(Floats x) {
  const Floats clipped = smaller(larger(x, all(-15.0f)), all(15.0f));
  const Floats twice = exponential(clipped * 2.0f);
  const Floats wide = (twice - 1.0f) / (twice + 1.0f);
  const Floats square = x * x;  // near zero the difference above cancels
  const Floats narrow = x * (1.0f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
  const Ints small = (x < all(0.1f)) & (x > all(-0.1f));
  return small ? narrow : wide;
}

}  // namespace
}  // namespace fettle
