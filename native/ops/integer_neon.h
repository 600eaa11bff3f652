// Codes times bytes with the dot products of Armv8.2: sdot multiplies four signed units with four signed inputs and adds
// all four products to a sum of 32 bits. Units are 0 to 127, codes of 8 bits lie signed as they are; both fit.
//
// A step of the weight, 8 rows × 4 columns, is two registers; 16 columns of a token are one, and sdot picks the four
// columns of a step out of it by itself. The sums and their rounding are those of integer_avx512.h: a zero point that is
// one whole number for all is where a dot starts, and a token's sums are the same operations in the same order for a few
// tokens (unpacked in registers) and for many (a panel of two tiles in the first-level cache).
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "ops/kernels.h"
#include "ops/unpack.h"

namespace fettle {
namespace {

enum class Zero : int { whole, grouped };

// -zero · Σ codes of each block [tokens][blocks], of Zero::whole; the sum is the one that QuantizedInputs has in floats.
inline int32_t* find_starts(const QuantizedInputs& inputs, int blocks, int zero) {
  const int64_t count = static_cast<int64_t>(inputs.tokens) * blocks;
  int32_t* starts = new int32_t[static_cast<size_t>(count)];
  for (int64_t i = 0; i < count; ++i) {
    const float whole = inputs.scales[i] > 0 ? inputs.sums[i] / inputs.scales[i] : 0.0f;
    starts[i] = -zero * vcvtns_s32_f32(whole);
  }
  return starts;
}

// Chunk → units [8 steps][2 registers] as signed bytes.
template <int BITS, bool LOOKUP>
inline void unpack_units(const uint8_t* planes, uint8x16_t table, int8x16_t units[kChunkSteps][2]) {
  constexpr int kSecond = BITS & 4 ? 4 : 0, kThird = (BITS & 4) + (BITS & 2);
  for (int side = 0; side < 2; ++side) {
    const uint8_t* from = planes + side * 16;
    uint8x16_t codes[kChunkSteps];
    for (uint8x16_t& code : codes) code = vdupq_n_u8(0);
    if constexpr (BITS == 8)
      for (int i = 0; i < kChunkSteps; ++i) codes[i] = vld1q_u8(from + i * kStepBytes);
    if constexpr ((BITS & 4) != 0)
      for (int h = 0; h < 4; ++h, from += kStepBytes) {
        const uint8x16_t both = vld1q_u8(from);
        codes[2 * h] = vandq_u8(both, vdupq_n_u8(15));
        codes[2 * h + 1] = vshrq_n_u8(both, 4);
      }
    if constexpr ((BITS & 2) != 0)
      for (int q = 0; q < 2; ++q, from += kStepBytes) {
        const uint8x16_t four = vld1q_u8(from);
        for (int i = 0; i < 4; ++i) {
          const uint8x16_t part = vandq_u8(vshlq_u8(four, vdupq_n_s8(static_cast<int8_t>(kSecond - 2 * i))), vdupq_n_u8(3 << kSecond));
          codes[4 * q + i] = vorrq_u8(codes[4 * q + i], part);
        }
      }
    if constexpr ((BITS & 1) != 0) {
      const uint8x16_t eight = vld1q_u8(from);
      for (int i = 0; i < kChunkSteps; ++i) {
        const uint8x16_t part = vandq_u8(vshlq_u8(eight, vdupq_n_s8(static_cast<int8_t>(kThird - i))), vdupq_n_u8(1 << kThird));
        codes[i] = vorrq_u8(codes[i], part);
      }
    }
    for (int i = 0; i < kChunkSteps; ++i) {
      if constexpr (LOOKUP) codes[i] = vqtbl1q_u8(table, codes[i]);
      units[i][side] = vreinterpretq_s8_u8(codes[i]);
    }
  }
}

// What the rows of a tile share in a block.
struct SharedRows {
  float32x4_t scales[2], zeros[2];
};

inline SharedRows shared_rows(const CodedMatrix& weight, int tile, int group) {
  const Floats scales = group_scales(weight, tile, group), zeros = group_zeros(weight, tile, group);
  SharedRows shared;
  std::memcpy(shared.scales, &scales, sizeof scales);
  std::memcpy(shared.zeros, &zeros, sizeof zeros);
  return shared;
}

// sum + scale · (what a block of one token gives to four rows)
template <Zero ZERO>
inline float32x4_t add_dot(float32x4_t sum, int32x4_t dot, float32x4_t scales, float32x4_t zeros, float input_scale, float input_sum) {
  const float32x4_t wide = vcvtq_f32_s32(dot);
  if constexpr (ZERO == Zero::whole) return vfmaq_f32(sum, vmulq_n_f32(scales, input_scale), wide);
  const float32x4_t shift = vmulq_n_f32(zeros, input_sum);
  return vfmaq_f32(sum, scales, vfmaq_f32(vnegq_f32(shift), wide, vdupq_n_f32(input_scale)));
}

// Four steps of R registers with T tokens.
template <int R, int T>
inline void multiply_half(const int8x16_t* units, const int8_t* codes, int64_t padded, int32x4_t dots[T][R]) {
  for (int t = 0; t < T; ++t) {
    const int8x16_t x = vld1q_s8(codes + t * padded);
    for (int r = 0; r < R; ++r) {
      dots[t][r] = vdotq_laneq_s32(dots[t][r], units[r], x, 0);
      dots[t][r] = vdotq_laneq_s32(dots[t][r], units[R + r], x, 1);
      dots[t][r] = vdotq_laneq_s32(dots[t][r], units[2 * R + r], x, 2);
      dots[t][r] = vdotq_laneq_s32(dots[t][r], units[3 * R + r], x, 3);
    }
  }
}

template <Zero ZERO, int R, int T>
inline void start_dots(const int32_t* starts, int64_t at, int blocks, int32x4_t dots[T][R]) {
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) dots[t][r] = vdupq_n_s32(ZERO == Zero::whole ? starts[at + static_cast<int64_t>(t) * blocks] : 0);
}

// ---- a few tokens: one tile, T tokens from `token` on

template <int BITS, bool LOOKUP, Zero ZERO, int T>
void few_tile(const CodedMatrix& weight, const QuantizedInputs& inputs, const int32_t* starts, int token, int tile, float* out,
              int64_t stride) {
  const Cut& cut = weight.cut;
  const int blocks = cut.blocks(), block_halves = cut.block / 16;
  const int64_t padded = cut.padded(), first_at = static_cast<int64_t>(token) * blocks;
  const uint8x16_t table = vld1q_u8(weight.units);
  const int8_t* codes = inputs.codes + token * padded;
  float32x4_t sums[T][2];
  for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = vdupq_n_f32(0);
  int32x4_t dots[T][2];
  start_dots<ZERO, 2, T>(starts, first_at, blocks, dots);
  SharedRows shared = shared_rows(weight, tile, 0);
  int left = block_halves, block = 0, group = 0;
  const uint8_t* planes = chunk_of(weight, tile, 0);
  for (int chunk = 0; chunk < cut.chunks; ++chunk, planes += kChunkColumns * BITS) {
    int8x16_t units[kChunkSteps][2];
    unpack_units<BITS, LOOKUP>(planes, table, units);
    for (int part = 0; part < 2; ++part, codes += 16) {
      multiply_half<2, T>(units[part * 4], codes, padded, dots);
      if (--left != 0) continue;
      if (block * cut.block / cut.padded_group != group) shared = shared_rows(weight, tile, group = block * cut.block / cut.padded_group);
      for (int t = 0; t < T; ++t) {
        const int64_t at = first_at + static_cast<int64_t>(t) * blocks + block;
        for (int r = 0; r < 2; ++r)
          sums[t][r] = add_dot<ZERO>(sums[t][r], dots[t][r], shared.scales[r], shared.zeros[r], inputs.scales[at], inputs.sums[at]);
      }
      left = block_halves;
      if (++block < blocks) start_dots<ZERO, 2, T>(starts, first_at + block, blocks, dots);
    }
  }
  const int row = tile * kTileRows, count = weight.rows - row < kTileRows ? weight.rows - row : kTileRows;
  for (int t = 0; t < T; ++t) {
    float rows[kTileRows];
    for (int r = 0; r < 2; ++r) vst1q_f32(rows + 4 * r, vmulq_n_f32(sums[t][r], weight.gain * weight.unit_size));
    std::memcpy(out + (token + t) * stride + row, rows, static_cast<size_t>(count) * sizeof(float));
  }
}

template <int BITS, bool LOOKUP, Zero ZERO>
void few_tokens(const CodedMatrix& weight, const QuantizedInputs& inputs, const int32_t* starts, Span span, float* out, int64_t stride) {
  for (int tile = span.first; tile < span.last; ++tile) {
    int t = 0;
    for (; t + 4 <= inputs.tokens; t += 4) few_tile<BITS, LOOKUP, ZERO, 4>(weight, inputs, starts, t, tile, out, stride);
    for (; t < inputs.tokens; ++t) few_tile<BITS, LOOKUP, ZERO, 1>(weight, inputs, starts, t, tile, out, stride);
  }
}

// ---- many tokens

constexpr int kDotChunks = 32;   // of a panel of two tiles: 16 kB of units
constexpr int kDotTokens = 128;  // that a panel serves before the next

struct DotPanel {
  int8x16_t units[kDotChunks * kChunkSteps * 4];  // [steps][2 tiles][2]
  SharedRows shared[2 * kDotChunks][2];           // of each block and tile
};

template <Zero ZERO, int T>
__attribute__((noinline)) void multiply_panel_units(const DotPanel& panel, const QuantizedInputs& inputs, const int32_t* starts, int token,
                                                    int first_block, int blocks, const Cut& cut, float* sums) {
  const int all_blocks = cut.blocks(), halves = cut.block / 16;
  const int64_t padded = cut.padded();
  const int8_t* codes = inputs.codes + token * padded + first_block * cut.block;
  const int8x16_t* units = panel.units;
  for (int block = 0; block < blocks; ++block) {
    const int64_t first_at = static_cast<int64_t>(token) * all_blocks + first_block + block;
    int32x4_t dots[T][4];
    start_dots<ZERO, 4, T>(starts, first_at, all_blocks, dots);
    for (int half = 0; half < halves; ++half, codes += 16, units += 16) multiply_half<4, T>(units, codes, padded, dots);
    for (int t = 0; t < T; ++t) {
      const int64_t at = first_at + static_cast<int64_t>(t) * all_blocks;
      for (int r = 0; r < 4; ++r) {
        const SharedRows& shared = panel.shared[block][r / 2];
        float* sum = sums + t * 16 + r * 4;
        vst1q_f32(sum, add_dot<ZERO>(vld1q_f32(sum), dots[t][r], shared.scales[r % 2], shared.zeros[r % 2], inputs.scales[at], inputs.sums[at]));
      }
    }
  }
}

template <int BITS, bool LOOKUP>
void fill_panel(const CodedMatrix& weight, int tile, int first_block, int blocks, int side, DotPanel& panel) {
  const Cut& cut = weight.cut;
  const uint8x16_t table = vld1q_u8(weight.units);
  const int first = first_block * cut.block / kChunkColumns, last = (first_block + blocks) * cut.block / kChunkColumns;
  int8x16_t* to = panel.units + side * 2;
  for (int chunk = first; chunk < last; ++chunk) {
    int8x16_t units[kChunkSteps][2];
    unpack_units<BITS, LOOKUP>(chunk_of(weight, tile, chunk), table, units);
    for (int i = 0; i < kChunkSteps; ++i, to += 4) {
      to[0] = units[i][0];
      to[1] = units[i][1];
    }
  }
  for (int block = 0; block < blocks; ++block)
    panel.shared[block][side] = shared_rows(weight, tile, (first_block + block) * cut.block / cut.padded_group);
}

using Fill = void (*)(const CodedMatrix&, int tile, int first_block, int blocks, int side, DotPanel&);

template <Zero ZERO>
void many_tokens(Fill fill, const CodedMatrix& weight, const QuantizedInputs& inputs, const int32_t* starts, Span span, float* out,
                 int64_t stride) {
  const Cut& cut = weight.cut;
  const int step = kDotChunks * kChunkColumns / cut.block / 2 * 2;  // blocks of a panel, whole chunks
  DotPanel* panel = new DotPanel;
  float sums[kDotTokens * 16];
  for (int first = 0; first < inputs.tokens; first += kDotTokens) {
    const int end = first + kDotTokens < inputs.tokens ? first + kDotTokens : inputs.tokens;
    for (int tile = span.first; tile < span.last; tile += 2) {
      std::memset(sums, 0, sizeof sums);
      for (int block = 0; block < cut.blocks(); block += step) {
        const int blocks = cut.blocks() - block < step ? cut.blocks() - block : step;
        for (int side = 0; side < 2; ++side) fill(weight, tile + side < span.last ? tile + side : tile, block, blocks, side, *panel);
        int t = first;
        for (; t + 4 <= end; t += 4) multiply_panel_units<ZERO, 4>(*panel, inputs, starts, t, block, blocks, cut, sums + (t - first) * 16);
        for (; t < end; ++t) multiply_panel_units<ZERO, 1>(*panel, inputs, starts, t, block, blocks, cut, sums + (t - first) * 16);
      }
      const int row = tile * kTileRows, here = tile + 1 < span.last ? 2 * kTileRows : kTileRows;
      const int count = weight.rows - row < here ? weight.rows - row : here;
      for (int t = first; t < end; ++t)
        for (int i = 0; i < count; ++i) out[t * stride + row + i] = sums[(t - first) * 16 + i] * (weight.gain * weight.unit_size);
    }
  }
  delete panel;
}

// ---- which of them

template <int BITS, bool LOOKUP, Zero ZERO>
void dot_matmul(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  const int32_t* starts = ZERO == Zero::whole ? find_starts(inputs, weight.cut.blocks(), static_cast<int>(weight.zero)) : nullptr;
  if (inputs.tokens <= 4) {
    few_tokens<BITS, LOOKUP, ZERO>(weight, inputs, starts, span, out, stride);
  } else {
    many_tokens<ZERO>(fill_panel<BITS, LOOKUP>, weight, inputs, starts, span, out, stride);
  }
  delete[] starts;
}

template <int BITS>
inline void choose_dot(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  const bool whole = weight.zero == static_cast<float>(static_cast<int>(weight.zero)) && weight.zero >= -256 && weight.zero <= 256;
  if constexpr (BITS <= 4) {
    if (!weight.equal_steps) return dot_matmul<BITS, true, Zero::grouped>(weight, inputs, span, out, stride);
  }
  if (whole && weight.zeros == nullptr) return dot_matmul<BITS, false, Zero::whole>(weight, inputs, span, out, stride);
  dot_matmul<BITS, false, Zero::grouped>(weight, inputs, span, out, stride);
}

void coded_integer_dot(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  switch (weight.bits) {
    case 1: return choose_dot<1>(weight, inputs, span, out, stride);
    case 2: return choose_dot<2>(weight, inputs, span, out, stride);
    case 3: return choose_dot<3>(weight, inputs, span, out, stride);
    case 4: return choose_dot<4>(weight, inputs, span, out, stride);
    case 5: return choose_dot<5>(weight, inputs, span, out, stride);
    case 6: return choose_dot<6>(weight, inputs, span, out, stride);
    case 7: return choose_dot<7>(weight, inputs, span, out, stride);
    default: return choose_dot<8>(weight, inputs, span, out, stride);
  }
}

}  // namespace
}  // namespace fettle
