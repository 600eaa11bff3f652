// The registers of integer_avx2.h: units unpacked from planes of bits, products of neighbours, a block added to a sum.
#pragma once

#include <immintrin.h>

#include "ops/kernels.h"
#include "ops/unpack.h"

namespace fettle {
namespace {

// How units are had: a code is its unit; or looked up, up to 32, or up to 127.
enum class Units : int { equal, narrow, wide };

constexpr int flush_steps(int bits, Units units) {
  if (units != Units::equal) return units == Units::narrow ? 4 : 1;
  return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
}

inline __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m256i repeat_four(const int8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, sizeof four);
  return _mm256_set1_epi32(four);
}

// Chunk → codes of 8 steps, in registers. AT: where the plane's bits belong in a code.
template <int BITS>
inline void unpack_registers(const uint8_t* planes, __m256i codes[kChunkSteps]) {
  if constexpr (BITS == 8) {
    for (int i = 0; i < kChunkSteps; ++i) codes[i] = load_bytes(planes + i * kStepBytes);
    return;
  }
  constexpr int kSecond = BITS & 4 ? 4 : 0, kThird = (BITS & 4) + (BITS & 2);
  if constexpr ((BITS & 4) != 0) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int h = 0; h < 4; ++h, planes += kStepBytes) {
      const __m256i both = load_bytes(planes);
      codes[2 * h] = _mm256_and_si256(both, mask);
      codes[2 * h + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
  }
  if constexpr ((BITS & 2) != 0) {
    const __m256i mask = _mm256_set1_epi8(3 << kSecond);
    for (int q = 0; q < 2; ++q, planes += kStepBytes) {
      const __m256i four = load_bytes(planes);
      for (int i = 0; i < 4; ++i) {
        const int right = 2 * i - kSecond;
        const __m256i moved = right >= 0 ? _mm256_srli_epi16(four, right) : _mm256_slli_epi16(four, -right);
        const __m256i part = _mm256_and_si256(moved, mask);
        codes[4 * q + i] = kSecond ? _mm256_or_si256(codes[4 * q + i], part) : part;
      }
    }
  }
  if constexpr ((BITS & 1) != 0) {
    const __m256i mask = _mm256_set1_epi8(1 << kThird), eight = load_bytes(planes);
    for (int i = 0; i < kChunkSteps; ++i) {
      const int right = i - kThird;
      const __m256i moved = right >= 0 ? _mm256_srli_epi16(eight, right) : _mm256_slli_epi16(eight, -right);
      const __m256i part = _mm256_and_si256(moved, mask);
      codes[i] = kThird ? _mm256_or_si256(codes[i], part) : part;
    }
  }
}

// 16-bit sums of neighbours: units × inputs; SIGNED for codes of 8 bits.
template <bool SIGNED>
inline __m256i multiply(__m256i units, __m256i inputs) {
  if constexpr (SIGNED) return _mm256_maddubs_epi16(_mm256_abs_epi8(units), _mm256_sign_epi8(inputs, units));
  return _mm256_maddubs_epi16(units, inputs);
}

inline __m256i widen_pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// sum + scale · (what a block of one token gives)
template <bool CENTRED>
inline __m256 add_block(__m256 sum, __m256i dot, __m256 scales, __m256 zeros, float input_scale, float input_sum) {
  const __m256 wide = _mm256_cvtepi32_ps(dot);
  if constexpr (CENTRED) return _mm256_fmadd_ps(_mm256_mul_ps(scales, _mm256_set1_ps(input_scale)), wide, sum);
  const __m256 centred = _mm256_fmsub_ps(wide, _mm256_set1_ps(input_scale), _mm256_mul_ps(zeros, _mm256_set1_ps(input_sum)));
  return _mm256_fmadd_ps(scales, centred, sum);
}

}  // namespace
}  // namespace fettle
