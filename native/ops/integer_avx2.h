// Codes times bytes with AVX2: maddubs multiplies unsigned units with signed inputs and adds neighbours in 16 bits.
//
//   Σ unit·code of a block, for 8 rows at once          then   sum += scale · scale_of_inputs · (dot - zero · Σ codes)
//
// A step of the weight is one register of 8 rows × 4 columns, the 4 codes of the inputs are repeated in all lanes, so no
// sum crosses lanes. 16 bits hold `flush` such products before they are widened: 8 for units below 16, 1 from 64 on.
// Codes of 8 bits are signed: |code| times the input with the code's sign. Where the zero point is one whole number for
// all, its share -zero · Σ codes is what the 16-bit sums start from, and costs nothing.
//
// Two shapes: a few tokens unpack in registers as they go (decoding: memory is the limit); many tokens unpack a panel of
// 16 rows into the first-level cache once and use it for all (prefill: arithmetic is the limit). Both do the same
// operations in the same order for a token, so their results are the same to the bit.
#pragma once

#include <immintrin.h>

#include "ops/integer_registers_avx2.h"
#include "ops/kernels.h"

namespace fettle {
namespace {

constexpr int kHalfSteps = kChunkSteps / 2;

// ---- a few tokens

// One tile, T tokens from `token` on. CENTRED: `zero` is whole and the same everywhere.
template <int BITS, Units UNITS, bool CENTRED, int T>
inline void few_tile(const CodedMatrix& weight, const QuantizedInputs& inputs, int token, int tile, __m256 sums[T]) {
  constexpr int kFlush = flush_steps(BITS, UNITS) < kHalfSteps ? flush_steps(BITS, UNITS) : kHalfSteps;
  constexpr bool kSigned = BITS == 8;
  const Cut& cut = weight.cut;
  const int padded = cut.padded(), blocks = cut.blocks(), block_halves = cut.block / 16;
  const int group_halves = cut.padded_group / 16;
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.units)));
  const __m256i minus_zero = _mm256_set1_epi16(static_cast<int16_t>(-weight.zero));
  const int8_t* codes[T];
  const int32_t* pairs[T];
  for (int t = 0; t < T; ++t) {
    codes[t] = inputs.codes + static_cast<int64_t>(token + t) * padded;
    pairs[t] = inputs.pairs + static_cast<int64_t>(token + t) * (padded / 16);
    sums[t] = _mm256_setzero_ps();
  }
  __m256i dots[T];
  for (int t = 0; t < T; ++t) dots[t] = _mm256_setzero_si256();
  __m256 scales = _mm256_setzero_ps(), zeros = _mm256_setzero_ps();
  int half = 0, left = block_halves, block = 0, group = 0, group_left = 0;
  const uint8_t* planes = chunk_of(weight, tile, 0);
  for (int chunk = 0; chunk < cut.chunks; ++chunk, planes += kChunkColumns * BITS) {
    __m256i units[kChunkSteps];
    _mm_prefetch(reinterpret_cast<const char*>(planes + 2048), _MM_HINT_T0);
    if constexpr (BITS > 2) _mm_prefetch(reinterpret_cast<const char*>(planes + 2048 + 64), _MM_HINT_T0);
    unpack_registers<BITS>(planes, units);
    for (int part = 0; part < 2; ++part, ++half) {
      if (group_left == 0) {
        scales = group_scales(weight, tile, group);
        if constexpr (!CENTRED) zeros = group_zeros(weight, tile, group);
        ++group;
        group_left = group_halves;
      }
      --group_left;
      for (int first = 0; first < kHalfSteps; first += kFlush) {
        __m256i narrow[T];
        for (int t = 0; t < T; ++t) {
          narrow[t] = _mm256_setzero_si256();
          if constexpr (CENTRED && !kSigned) narrow[t] = _mm256_mullo_epi16(_mm256_set1_epi32(pairs[t][half]), minus_zero);
        }
        for (int i = first; i < first + kFlush; ++i) {
          __m256i unit = units[part * kHalfSteps + i];
          if constexpr (UNITS != Units::equal) unit = _mm256_shuffle_epi8(table, unit);
          for (int t = 0; t < T; ++t)
            narrow[t] = _mm256_add_epi16(narrow[t], multiply<kSigned>(unit, repeat_four(codes[t] + half * 16 + i * 4)));
        }
        for (int t = 0; t < T; ++t) dots[t] = _mm256_add_epi32(dots[t], widen_pairs(narrow[t]));
      }
      if (--left == 0) {
        for (int t = 0; t < T; ++t) {
          const int64_t at = static_cast<int64_t>(token + t) * blocks + block;
          sums[t] = add_block<CENTRED>(sums[t], dots[t], scales, zeros, inputs.scales[at], inputs.sums[at]);
          dots[t] = _mm256_setzero_si256();
        }
        left = block_halves;
        ++block;
      }
    }
  }
}

inline void store_rows(float* to, __m256 values, int count) {
  if (count >= kTileRows) {
    _mm256_storeu_ps(to, values);
    return;
  }
  float all_rows[kTileRows];
  _mm256_storeu_ps(all_rows, values);
  for (int row = 0; row < count; ++row) to[row] = all_rows[row];
}

template <int BITS, Units UNITS, bool CENTRED>
void few_tokens(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  const __m256 gain = _mm256_set1_ps(weight.gain * weight.unit_size);
  for (int tile = span.first; tile < span.last; ++tile) {
    const int row = tile * kTileRows;
    int token = 0;
    __m256 sums[4];
    for (; token + 4 <= inputs.tokens; token += 4) {
      few_tile<BITS, UNITS, CENTRED, 4>(weight, inputs, token, tile, sums);
      for (int t = 0; t < 4; ++t)
        store_rows(out + (token + t) * stride + row, _mm256_mul_ps(sums[t], gain), weight.rows - row);
    }
    for (; token + 2 <= inputs.tokens; token += 2) {
      few_tile<BITS, UNITS, CENTRED, 2>(weight, inputs, token, tile, sums);
      for (int t = 0; t < 2; ++t)
        store_rows(out + (token + t) * stride + row, _mm256_mul_ps(sums[t], gain), weight.rows - row);
    }
    if (token < inputs.tokens) {
      few_tile<BITS, UNITS, CENTRED, 1>(weight, inputs, token, tile, sums);
      store_rows(out + token * stride + row, _mm256_mul_ps(sums[0], gain), weight.rows - row);
    }
  }
}

// ---- many tokens

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
inline void multiply_units(const UnitPanel& panel, const QuantizedInputs& inputs, int token, int first_block, int blocks,
                           const Cut& cut, const int32_t* starts, float* sums) {
  const int padded = cut.padded(), all_blocks = cut.blocks(), runs = padded / (FLUSH * kStepColumns);
  const int segments = SINGLE ? 1 : cut.block / (FLUSH * kStepColumns);
  const int8_t* codes = inputs.codes + static_cast<int64_t>(token) * padded + first_block * cut.block;
  if constexpr (CENTRED && !SIGNED) starts += static_cast<int64_t>(token) * runs + first_block * segments;
  const uint8_t *low = panel.units[0], *high = panel.units[1];
  for (int block = 0; block < blocks; ++block) {
    __m256i dots[2][T];
    if constexpr (!SINGLE)
      for (int t = 0; t < T; ++t) dots[0][t] = dots[1][t] = _mm256_setzero_si256();
    for (int segment = 0; segment < segments; ++segment) {
      __m256i narrow[2][T];
      for (int t = 0; t < T; ++t) {
        __m256i start = _mm256_setzero_si256();
        if constexpr (CENTRED && !SIGNED) start = _mm256_set1_epi32(starts[t * runs]);
        narrow[0][t] = narrow[1][t] = start;
      }
#pragma GCC unroll 8
      for (int i = 0; i < FLUSH; ++i) {
        const __m256i a = load_bytes(low + i * kStepBytes), b = load_bytes(high + i * kStepBytes);
        for (int t = 0; t < T; ++t) {
          const __m256i x = repeat_four(codes + static_cast<int64_t>(t) * padded + i * kStepColumns);
          narrow[0][t] = _mm256_add_epi16(narrow[0][t], multiply<SIGNED>(a, x));
          narrow[1][t] = _mm256_add_epi16(narrow[1][t], multiply<SIGNED>(b, x));
        }
      }
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
    for (int i = 0; i < 2; ++i) {
      const __m256 scales = _mm256_load_ps(panel.scales[i][block]), zeros = _mm256_load_ps(panel.zeros[i][block]);
      for (int t = 0; t < T; ++t) {
        const int64_t at = static_cast<int64_t>(token + t) * all_blocks + first_block + block;
        float* sum = sums + t * 2 * kTileRows + i * kTileRows;
        _mm256_storeu_ps(sum, add_block<CENTRED>(_mm256_loadu_ps(sum), dots[i][t], scales, zeros, inputs.scales[at], inputs.sums[at]));
      }
    }
  }
}

// -zero · Σ codes of each run of FLUSH steps, in the pairs of columns in which maddubs adds: [tokens][runs].
template <int FLUSH>
inline int32_t* run_starts(const QuantizedInputs& inputs, const Cut& cut, float zero) {
  constexpr int kHalves = FLUSH / kHalfSteps;  // at least one: see CENTRED in choose
  const int64_t runs = cut.padded() / (FLUSH * kStepColumns), count = inputs.tokens * runs;
  int32_t* starts = new int32_t[static_cast<size_t>(count)];
  const int minus = -static_cast<int>(zero);
  for (int64_t i = 0; i < count; ++i) {
    int low = 0, high = 0;
    for (int half = 0; half < kHalves; ++half) {
      const int32_t pair = inputs.pairs[i * kHalves + half];
      low += static_cast<int16_t>(pair & 0xffff);
      high += static_cast<int16_t>(pair >> 16);
    }
    starts[i] = static_cast<int32_t>((static_cast<uint32_t>(minus * high) << 16) | (static_cast<uint32_t>(minus * low) & 0xffffu));
  }
  return starts;
}

template <int BITS, Units UNITS>
inline void fill_units(const CodedMatrix& weight, int tile, int first_block, int blocks, UnitPanel& panel, int side) {
  const Cut& cut = weight.cut;
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.units)));
  const int first = first_block * cut.block / kChunkColumns;
  const int last = (first_block + blocks) * cut.block / kChunkColumns;
  uint8_t* to = panel.units[side];
  for (int chunk = first; chunk < last; ++chunk) {
    __m256i units[kChunkSteps];
    unpack_registers<BITS>(chunk_of(weight, tile, chunk), units);
    for (int i = 0; i < kChunkSteps; ++i, to += kStepBytes) {
      if constexpr (UNITS != Units::equal) units[i] = _mm256_shuffle_epi8(table, units[i]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), units[i]);
    }
  }
  for (int block = 0; block < blocks; ++block) {
    const int group = (first_block + block) * cut.block / cut.padded_group;
    _mm256_store_ps(panel.scales[side][block], group_scales(weight, tile, group));
    _mm256_store_ps(panel.zeros[side][block], group_zeros(weight, tile, group));
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
  constexpr int kFlush = flush_steps(BITS, UNITS);
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

// ---- which of them

constexpr int kFew = 4;  // tokens up to which unpacking again costs less than a panel

template <int BITS, Units UNITS, bool CENTRED>
void integer_matmul(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  if (inputs.tokens <= kFew) {
    few_tokens<BITS, UNITS, CENTRED>(weight, inputs, span, out, stride);
  } else {
    many_tokens<BITS, UNITS, CENTRED>(weight, inputs, span, out, stride);
  }
}

using Integer = void (*)(const CodedMatrix&, const QuantizedInputs&, Span, float*, int64_t);

template <int BITS>
inline Integer choose(const CodedMatrix& weight) {
  const bool whole = weight.zero == static_cast<float>(static_cast<int>(weight.zero)) && weight.zero >= 0;
  if (!weight.equal_steps) {
    if constexpr (BITS <= 4) {
      return weight.units[15] <= 32 ? integer_matmul<BITS, Units::narrow, false> : integer_matmul<BITS, Units::wide, false>;
    }
  }
  if constexpr (BITS <= 4) {
    if (weight.zeros == nullptr && whole && weight.zero < 16) return integer_matmul<BITS, Units::equal, true>;
  }
  if constexpr (BITS == 8) {
    if (weight.zeros == nullptr && weight.zero == 0) return integer_matmul<BITS, Units::equal, true>;
  }
  return integer_matmul<BITS, Units::equal, false>;
}

void coded_integer_matmul(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  static const auto find = [](const CodedMatrix& w) -> Integer {
    switch (w.bits) {
      case 1: return choose<1>(w);
      case 2: return choose<2>(w);
      case 3: return choose<3>(w);
      case 4: return choose<4>(w);
      case 5: return choose<5>(w);
      case 6: return choose<6>(w);
      case 7: return choose<7>(w);
      default: return choose<8>(w);
    }
  };
  find(weight)(weight, inputs, span, out, stride);
}

}  // namespace
}  // namespace fettle
