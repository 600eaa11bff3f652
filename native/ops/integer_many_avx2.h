// Codes times bytes for many tokens: a panel of 16 rows is unpacked into the first-level cache once and used for all of
// them (integer_avx2.h has the sums).
#pragma once

#include "ops/integer_few_avx2.h"

namespace fettle {
namespace {

constexpr int kPanelChunks = 32;  // of 2 tiles: 16 kB of units

// A panel of two tiles: units and what their groups share, unpacked.
struct UnitPanel {
  alignas(32) uint8_t units[2][kPanelChunks * kChunkSteps * kStepBytes];
  alignas(32) float scales[2][2 * kPanelChunks][kTileRows];  // of each block
  alignas(32) float zeros[2][2 * kPanelChunks][kTileRows];
};

// 2 tiles × T tokens over the blocks of a panel; sums [T][16]. FLUSH steps fit 16 bits; a block is one such run (SINGLE)
// or several. starts: where each run of a token begins, [tokens][run_count] as pairs of 16 bits; of CENTRED kernels only.
template <int FLUSH, bool SIGNED, bool CENTRED, bool SINGLE, int T>
__attribute__((noinline)) void multiply_units(const UnitPanel& panel, const QuantizedInputs& inputs, int token, int first_block,
                                              int blocks, const Cut& cut, const int32_t* starts, float* sums) {
  const int padded = cut.padded(), all_blocks = cut.blocks(), runs = padded / (FLUSH * kStepColumns);
  const int segments = SINGLE ? 1 : cut.block / (FLUSH * kStepColumns);
  const int8_t* codes = inputs.codes + static_cast<int64_t>(token) * padded + first_block * cut.block;
  if constexpr (CENTRED && !SIGNED) starts += static_cast<int64_t>(token) * runs + first_block * segments;
  const float* input_scales = inputs.scales + static_cast<int64_t>(token) * all_blocks + first_block;
  const float* input_sums = inputs.sums + static_cast<int64_t>(token) * all_blocks + first_block;
  const uint8_t *low = panel.units[0], *high = panel.units[1];
  for (int block = 0; block < blocks; ++block) {
    __m256i dots[2][T];
    if constexpr (!SINGLE || SIGNED)
      for (int t = 0; t < T; ++t) dots[0][t] = dots[1][t] = _mm256_setzero_si256();
    for (int segment = 0; segment < segments; ++segment) {
      __m256i narrow[2][T];
      if constexpr (!SIGNED)
        for (int t = 0; t < T; ++t)
          narrow[0][t] = narrow[1][t] = CENTRED ? _mm256_set1_epi32(starts[t * runs]) : _mm256_setzero_si256();
#pragma GCC unroll 16
      for (int i = 0; i < FLUSH; ++i) {
        const __m256i units[2] = {load_bytes(low + i * kStepBytes), load_bytes(high + i * kStepBytes)};
        if constexpr (SIGNED) {
          add_signed_step(dots, units, codes + i * kStepColumns, padded);
        } else {
          add_step(narrow, units, codes + i * kStepColumns, padded);
        }
      }
      if constexpr (!SIGNED)
        for (int t = 0; t < T; ++t)
          for (int i = 0; i < 2; ++i) {
            const __m256i wide = widen_pairs(narrow[i][t]);
            dots[i][t] = SINGLE ? wide : _mm256_add_epi32(dots[i][t], wide);
          }
      low += FLUSH * kStepBytes;
      high += FLUSH * kStepBytes;
      codes += FLUSH * kStepColumns;
      if constexpr (CENTRED && !SIGNED) ++starts;
    }
    asm volatile("" : : : "memory");  // the sums stay in memory: their registers are needed above
    const __m256 scales[2] = {_mm256_load_ps(panel.scales[0][block]), _mm256_load_ps(panel.scales[1][block])};
    const __m256 zeros[2] = {_mm256_load_ps(panel.zeros[0][block]), _mm256_load_ps(panel.zeros[1][block])};
    for (int t = 0; t < T; ++t) {
      const float input_scale = input_scales[t * all_blocks], input_sum = CENTRED ? 0.0f : input_sums[t * all_blocks];
      for (int i = 0; i < 2; ++i) {
        float* sum = sums + (t * 2 + i) * kTileRows;
        _mm256_storeu_ps(sum, add_block<CENTRED>(_mm256_loadu_ps(sum), dots[i][t], scales[i], zeros[i], input_scale, input_sum));
      }
    }
    ++input_scales;
    ++input_sums;
  }
}

template <int BITS, Units UNITS>
inline void fill_units(const CodedMatrix& weight, int tile, int first_block, int blocks, UnitPanel& panel, int side) {
  const Cut& cut = weight.cut;
  const __m256i table = unit_table(weight);
  const int first = first_block * cut.block / kChunkColumns;
  const int last = (first_block + blocks) * cut.block / kChunkColumns;
  uint8_t* to = panel.units[side];
  for (int chunk = first; chunk < last; ++chunk) {
    const uint8_t* planes = chunk_of(weight, tile, chunk);
#pragma GCC unroll 8
    for (int i = 0; i < kChunkSteps; ++i, to += kStepBytes) {
      __m256i units = unpack_step<BITS>(planes, i);
      if constexpr (UNITS != Units::equal) units = _mm256_shuffle_epi8(table, units);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), units);
    }
  }
  for (int block = 0; block < blocks; ++block) {
    const int group = (first_block + block) * cut.block / cut.padded_group;
    _mm256_store_ps(panel.scales[side][block], group_scales(weight, tile, group));
    _mm256_store_ps(panel.zeros[side][block], fast_group_zeros(weight, tile, group));
  }
}

// Tokens first … last-1; sums [last - first][16].
template <int FLUSH, bool SIGNED, bool CENTRED, bool SINGLE>
inline void multiply_all(const UnitPanel& panel, const QuantizedInputs& inputs, int first, int last, int first_block, int blocks,
                         const Cut& cut, const int32_t* starts, float* sums) {
  int t = first;
  for (; t + 4 <= last; t += 4, sums += 4 * 16)
    multiply_units<FLUSH, SIGNED, CENTRED, SINGLE, 4>(panel, inputs, t, first_block, blocks, cut, starts, sums);
  for (; t < last; ++t, sums += 16)
    multiply_units<FLUSH, SIGNED, CENTRED, SINGLE, 1>(panel, inputs, t, first_block, blocks, cut, starts, sums);
}

// Tokens that a panel is multiplied with before the next: their sums stay in the first-level cache, their codes in the
// second, while all rows pass; unpacking the panel again for the next ones costs a hundredth.
constexpr int kTogetherTokens = 64;

// All tokens with runs of FLUSH steps.
template <int BITS, Units UNITS, bool CENTRED, int FLUSH, bool SINGLE>
void many_in_runs(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  const Cut& cut = weight.cut;
  const int step = kPanelChunks * kChunkColumns / cut.block / 2 * 2;  // blocks of a panel, whole chunks
  const __m256 gain = _mm256_set1_ps(weight.gain * weight.unit_size);
  UnitPanel* panel = new UnitPanel;
  alignas(32) float sums[kTogetherTokens * 2 * kTileRows];
  const int32_t* starts = nullptr;
  if constexpr (CENTRED && BITS != 8) starts = run_starts<FLUSH>(inputs, cut, weight.zero);
  for (int token = 0; token < inputs.tokens; token += kTogetherTokens) {
    const int last = token + kTogetherTokens < inputs.tokens ? token + kTogetherTokens : inputs.tokens;
    for (int tile = span.first; tile < span.last; tile += 2) {
      const int sides = tile + 1 < span.last ? 2 : 1;
      std::memset(sums, 0, sizeof sums);
      for (int first = 0; first < cut.blocks(); first += step) {
        const int blocks = cut.blocks() - first < step ? cut.blocks() - first : step;
        for (int side = 0; side < 2; ++side)
          fill_units<BITS, UNITS>(weight, tile + (side < sides ? side : 0), first, blocks, *panel, side);
        multiply_all<FLUSH, BITS == 8, CENTRED, SINGLE>(*panel, inputs, token, last, first, blocks, cut, starts, sums);
      }
      for (int side = 0; side < sides; ++side) {
        const int row = (tile + side) * kTileRows;
        for (int t = token; t < last; ++t) {
          const __m256 sum = _mm256_load_ps(sums + ((t - token) * 2 + side) * kTileRows);
          store_rows(out + t * stride + row, _mm256_mul_ps(sum, gain), weight.rows - row);
        }
      }
    }
  }
  delete[] starts;
  delete panel;
}

template <int BITS, Units UNITS, bool CENTRED>
void many_tokens(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  constexpr int kFlush = BITS == 8 ? kChunkSteps : flush_steps(BITS, UNITS);  // sums of 8 bits are wide from the start
  constexpr int kHalf = kFlush < kHalfSteps ? kFlush : kHalfSteps;  // for blocks of half a chunk
  if (weight.cut.block < kChunkColumns) return many_in_runs<BITS, UNITS, CENTRED, kHalf, kHalf == kHalfSteps>(weight, inputs, span, out, stride);
  if constexpr (CENTRED && BITS <= 4) {
    // What a sum is in the end fits 16 bits for twice as many steps, 8 · 127 · 32 = 32,512, and what it wraps through
    // on the way does not matter.
    const bool near = weight.zero <= 8 && (1 << BITS) - 1 - weight.zero <= 8;
    if (near && weight.cut.block % (16 * kStepColumns) == 0)
      return many_in_runs<BITS, UNITS, CENTRED, 16, false>(weight, inputs, span, out, stride);
  }
  if (weight.cut.block == kFlush * kStepColumns) return many_in_runs<BITS, UNITS, CENTRED, kFlush, true>(weight, inputs, span, out, stride);
  many_in_runs<BITS, UNITS, CENTRED, kFlush, false>(weight, inputs, span, out, stride);
}

}  // namespace
}  // namespace fettle
