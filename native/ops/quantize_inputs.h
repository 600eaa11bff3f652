// Inputs → bytes: a scale for each token and block of columns, codes from -127 to 127. Included once for each
// instruction set; the roundings are the same everywhere: x · (127 / max|x|), to the nearest, ties to even.
#pragma once

#include "ops/kernels.h"
#include "ops/vectors.h"

namespace fettle {
namespace {

// Codes of one block [length], a multiple of 8; returns scale and, through `total`, the sum of the codes.
inline float quantize_block(const float* x, int length, int8_t* codes, float* total) {
  Floats tops = {};
  for (int i = 0; i < length; i += 8) {
    const Floats value = load(x + i);
    tops = larger(tops, larger(value, -value));
  }
  const float top = largest(tops);
  const float inverse = top > 0 ? 127.0f / top : 0.0f;
  Ints sums = {};
  for (int i = 0; i < length; i += 8) {
    const Ints rounded = to_nearest(load(x + i) * inverse);
    sums += rounded;
    const Bytes bytes = __builtin_convertvector(rounded, Bytes);
    std::memcpy(codes + i, &bytes, sizeof bytes);
  }
  int sum = 0;
  for (int j = 0; j < 8; ++j) sum += sums[j];
  *total = static_cast<float>(sum);
  return top / 127.0f;
}

// Two sums of 16 bits for each half chunk: columns 0 and 1, columns 2 and 3 of its four steps.
inline void sum_pairs(const int8_t* codes, int padded, int32_t* pairs) {
  for (int half = 0; half < padded / 16; ++half, codes += 16) {
#if defined(__AVX2__)
    __m128i bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    __m128i sums = _mm_maddubs_epi16(_mm_set1_epi8(1), bytes);
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4e));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xb1));
    pairs[half] = _mm_cvtsi128_si32(sums);
    continue;
#endif
    int low = 0, high = 0;
    for (int step = 0; step < 16; step += kStepColumns) {
      low += codes[step] + codes[step + 1];
      high += codes[step + 2] + codes[step + 3];
    }
    pairs[half] = static_cast<int32_t>((static_cast<uint32_t>(high) << 16) | (static_cast<uint32_t>(low) & 0xffffu));
  }
}

void quantize_inputs(const float* inputs, const Cut& cut, int first, int last, const InputBuffers& to) {
  const int padded = cut.padded(), blocks = cut.blocks();
  const bool plain = cut.columns == padded && cut.group == cut.padded_group;
  float* room = plain ? nullptr : new float[static_cast<size_t>(padded)];
  for (int t = first; t < last; ++t) {
    const float* x = inputs + static_cast<int64_t>(t) * cut.columns;
    if (!plain) {
      for (int i = 0; i < padded; ++i) room[i] = 0;
      for (int column = 0; column < cut.columns; ++column)
        room[column / cut.group * cut.padded_group + column % cut.group] = x[column];
      x = room;
    }
    int8_t* codes = to.codes + static_cast<int64_t>(t) * padded;
    for (int block = 0; block < blocks; ++block) {
      const int64_t at = static_cast<int64_t>(t) * blocks + block;
      float total = 0;
      to.scales[at] = quantize_block(x + block * cut.block, cut.block, codes + block * cut.block, &total);
      to.sums[at] = to.scales[at] * total;
    }
    sum_pairs(codes, padded, to.pairs + static_cast<int64_t>(t) * (padded / 16));
  }
  delete[] room;
}

}  // namespace
}  // namespace fettle
