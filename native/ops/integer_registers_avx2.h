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

// The bits of a plane that `mask` names, moved right, or left where `right` is negative.
inline __m256i plane_bits(__m256i plane, int right, int mask) {
  const __m256i moved = right == 0 ? plane : right > 0 ? _mm256_srli_epi16(plane, right) : _mm256_slli_epi16(plane, -right);
  return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)));
}

// The codes of one step of a chunk; `step` is a constant once the loop over steps is unrolled.
template <int BITS>
inline __m256i unpack_step(const uint8_t* planes, int step) {
  if constexpr (BITS == 8) return load_bytes(planes + step * kStepBytes);
  constexpr int kSecond = BITS & 4, kThird = BITS & 6;  // where the bits of the narrower planes belong
  __m256i code = _mm256_setzero_si256();
  if constexpr ((BITS & 4) != 0) {
    code = plane_bits(load_bytes(planes + step / 2 * kStepBytes), step % 2 * 4, 15);
    planes += 4 * kStepBytes;
  }
  if constexpr ((BITS & 2) != 0) {
    const __m256i part = plane_bits(load_bytes(planes + step / 4 * kStepBytes), step % 4 * 2 - kSecond, 3 << kSecond);
    code = kSecond != 0 ? _mm256_or_si256(code, part) : part;
    planes += 2 * kStepBytes;
  }
  if constexpr ((BITS & 1) != 0) {
    const __m256i part = plane_bits(load_bytes(planes), step - kThird, 1 << kThird);
    code = kThird != 0 ? _mm256_or_si256(code, part) : part;
  }
  return code;
}

// Keeps a sum where the program says: gcc would otherwise put all products of a loop aside, in memory, and add them later.
inline void settle(__m256i& sum) { asm("" : "+x"(sum)); }

inline __m256i widen_pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

inline __m256i unit_table(const CodedMatrix& weight) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.units)));
}

// What the groups of a tile share, as group_zeros of unpack.h, in a few instructions.
inline __m256 fast_group_zeros(const CodedMatrix& weight, int tile, int group) {
  if (weight.zeros == nullptr) return _mm256_set1_ps(weight.zero);
  __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight.zeros + group_place(weight, tile, group)));
  if (!weight.equal_steps) codes = _mm_shuffle_epi8(_mm256_castsi256_si128(unit_table(weight)), codes);
  const __m256 units = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
  return weight.bits == 8 ? _mm256_sub_ps(units, _mm256_set1_ps(128.0f)) : units;
}

// to[i] = from[2i] + from[2i + 1], as pairs of 16 bits
inline void add_neighbours(const int32_t* from, int64_t count, int32_t* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 low = _mm256_loadu_ps(reinterpret_cast<const float*>(from + 2 * i));
    const __m256 high = _mm256_loadu_ps(reinterpret_cast<const float*>(from + 2 * i + 8));
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)), odd = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd));
    const __m256i sums = _mm256_permute4x64_epi64(_mm256_add_epi16(even, odd), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), sums);
  }
  for (; i < count; ++i) to[i] = _mm_cvtsi128_si32(_mm_add_epi16(_mm_cvtsi32_si128(from[2 * i]), _mm_cvtsi32_si128(from[2 * i + 1])));
}

// -zero · Σ codes of each run of STEPS steps, in the pairs of columns in which maddubs adds: [tokens][runs]. Runs are
// halves of chunks, chunks, or pairs of them. The caller deletes them.
template <int STEPS>
inline int32_t* run_starts(const QuantizedInputs& inputs, const Cut& cut, float zero) {
  const int64_t halves = static_cast<int64_t>(inputs.tokens) * cut.chunks * 2;
  int64_t runs = halves;
  int32_t* starts = new int32_t[static_cast<size_t>(halves)];
  const int32_t* from = inputs.pairs;
  for (int steps = kChunkSteps / 2; steps < STEPS; steps *= 2, from = starts) add_neighbours(from, runs /= 2, starts);
  const __m256i minus = _mm256_set1_epi16(static_cast<int16_t>(-static_cast<int>(zero)));
  int64_t i = 0;
  for (; i + 8 <= runs; i += 8) {
    const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(starts + i), _mm256_mullo_epi16(sums, minus));
  }
  for (; i < runs; ++i) starts[i] = _mm_cvtsi128_si32(_mm_mullo_epi16(_mm_cvtsi32_si128(from[i]), _mm256_castsi256_si128(minus)));
  return starts;
}

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
