// Codes times bytes for a few tokens: units are unpacked in registers as the weight goes by (integer_avx2.h has the sums).
//
// TILES tiles and TOKENS tokens share what is loaded: the codes of a token serve all tiles, the units of a step all tokens.
#pragma once

#include "ops/integer_steps_avx2.h"

namespace fettle {
namespace {

constexpr int kHalfSteps = kChunkSteps / 2;

// RUN steps (a chunk or half of it) of TILES tiles and TOKENS tokens into dots; `planes` are those of the tiles' chunks,
// `first` the run's first step in its chunk, `starts` what the sums of each token begin with.
template <int BITS, Units UNITS, bool CENTRED, int RUN, int TILES, int TOKENS>
inline void add_run(const uint8_t* const (&planes)[TILES], int first, const int8_t* codes, int64_t stride, __m256i table,
                    const int32_t* starts, int64_t runs, __m256i (&dots)[TILES][TOKENS]) {
  constexpr int kFlush = flush_steps(BITS, UNITS) < RUN ? flush_steps(BITS, UNITS) : RUN;
#pragma GCC unroll 8
  for (int from = 0; from < RUN; from += kFlush) {
    __m256i narrow[TILES][TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < TILES; ++r)
        narrow[r][t] = CENTRED && BITS != 8 ? _mm256_set1_epi32(starts[t * runs]) : _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int step = from; step < from + kFlush; ++step) {
      __m256i units[TILES];
      for (int r = 0; r < TILES; ++r) {
        units[r] = unpack_step<BITS>(planes[r], first + step);
        if constexpr (UNITS != Units::equal) units[r] = _mm256_shuffle_epi8(table, units[r]);
      }
      if constexpr (BITS == 8) {
        add_signed_step(dots, units, codes + step * kStepColumns, stride);
      } else {
        add_step(narrow, units, codes + step * kStepColumns, stride);
      }
    }
    if constexpr (BITS != 8)
#pragma GCC unroll 2
      for (int r = 0; r < TILES; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) dots[r][t] = _mm256_add_epi32(dots[r][t], widen_pairs(narrow[r][t]));
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

// Where what groups share lies, to be asked for evenly while the chunks of a tile go by.
struct Shared {
  const uint8_t* scales;
  int64_t tile_bytes, chunk_bytes;
};

inline Shared shared_of(const CodedMatrix& weight) {
  const int64_t bytes = static_cast<int64_t>(weight.cut.stored_groups()) * kTileRows * number_bytes(weight.scale_type);
  return Shared{static_cast<const uint8_t*>(weight.scales), bytes, (bytes + weight.cut.chunks - 1) / weight.cut.chunks};
}

// The tiles `tile` and, of two, `tile` + `last`; TOKENS tokens from `token` on. CENTRED: the zero point is whole and the same everywhere.
// RUN: steps between two ends of blocks, at most a chunk; EACH: every run ends a block and a group. What lies `ahead` tiles behind those that are used is asked for
// on the way, codes and what groups share: the processor's own guess comes too late, since it learns each tile anew.
template <int BITS, Units UNITS, bool CENTRED, int RUN, bool EACH, int TILES, int TOKENS>
__attribute__((noinline)) void few_tiles(const CodedMatrix& weight, const QuantizedInputs& inputs, int token, int tile, int last, int ahead,
                                         const int32_t* all_starts, float* out, int64_t stride) {
  constexpr int kRuns = kChunkSteps / RUN;  // of a chunk
  const Cut& cut = weight.cut;
  const int padded = cut.padded(), blocks = cut.blocks(), block_runs = cut.block / (RUN * kStepColumns);
  const int group_blocks = cut.padded_group / cut.block;
  const __m256i table = unit_table(weight);
  const int8_t* codes = inputs.codes + static_cast<int64_t>(token) * padded;
  const int64_t runs = static_cast<int64_t>(cut.chunks) * kRuns;
  const int32_t* starts = CENTRED && BITS != 8 ? all_starts + token * runs : nullptr;
  const float* input_scales = inputs.scales + static_cast<int64_t>(token) * blocks;
  const float* input_sums = inputs.sums + static_cast<int64_t>(token) * blocks;
  const int64_t codes_ahead = static_cast<int64_t>(ahead) * cut.chunks * kChunkColumns * BITS;
  const Shared shared = shared_of(weight);
  const uint8_t* planes[TILES];
  const uint8_t* next_shared[TILES];
  __m256i dots[TILES][TOKENS];
  __m256 sums[TILES][TOKENS];
  for (int r = 0; r < TILES; ++r) {
    planes[r] = chunk_of(weight, tile + r * last, 0);
    next_shared[r] = shared.scales + (tile + r * last + ahead) * shared.tile_bytes;
    for (int t = 0; t < TOKENS; ++t) {
      dots[r][t] = _mm256_setzero_si256();
      sums[r][t] = _mm256_setzero_ps();
    }
  }
  __m256 scales[TILES], zeros[TILES];
  int left = block_runs, group = 0, group_left = 0;
  for (int chunk = 0; chunk < cut.chunks; ++chunk) {
#pragma GCC unroll 2
    for (int part = 0; part < kRuns; ++part) {
      add_run<BITS, UNITS, CENTRED, RUN, TILES, TOKENS>(planes, part * RUN, codes, padded, table, starts, runs, dots);
      codes += RUN * kStepColumns;
      if constexpr (CENTRED && BITS != 8) ++starts;
      if (!EACH && --left != 0) continue;
      left = block_runs;
      if (EACH || group_left == 0) {
        for (int r = 0; r < TILES; ++r) {
          scales[r] = group_scales(weight, tile + r * last, group);
          zeros[r] = CENTRED ? _mm256_setzero_ps() : fast_group_zeros(weight, tile + r * last, group);
        }
        ++group;
        group_left = group_blocks;
      }
      --group_left;
      for (int t = 0; t < TOKENS; ++t) {
        const float input_scale = input_scales[t * blocks], input_sum = CENTRED ? 0.0f : input_sums[t * blocks];
        for (int r = 0; r < TILES; ++r) {
          sums[r][t] = add_block<CENTRED>(sums[r][t], dots[r][t], scales[r], zeros[r], input_scale, input_sum);
          dots[r][t] = _mm256_setzero_si256();
        }
      }
      ++input_scales;
      ++input_sums;
    }
    for (int r = 0; r < TILES; ++r) {
      for (int line = 0; line < kChunkColumns * BITS; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(planes[r] + codes_ahead + line), _MM_HINT_T1);
      planes[r] += kChunkColumns * BITS;
      if constexpr (TOKENS <= 2) {  // with more, arithmetic takes long enough, and pointers are short
        _mm_prefetch(reinterpret_cast<const char*>(next_shared[r]), _MM_HINT_T1);
        next_shared[r] += shared.chunk_bytes;
      }
    }
  }
  const __m256 gain = _mm256_set1_ps(weight.gain * weight.unit_size);
  for (int r = 0; r < TILES; ++r)
    for (int t = 0; t < TOKENS; ++t) {
      const int row = (tile + r * last) * kTileRows;
      store_rows(out + (token + t) * stride + row, _mm256_mul_ps(sums[r][t], gain), weight.rows - row);
    }
}

// The tiles `tile` and `tile` + `last` for all tokens: four at a time, then what is left.
template <int BITS, Units UNITS, bool CENTRED, int RUN, bool EACH>
inline void few_tokens_of(const CodedMatrix& weight, const QuantizedInputs& inputs, int tile, int last, int ahead,
                          const int32_t* starts, float* out, int64_t stride) {
  constexpr int kTiles = RUN == kChunkSteps ? 2 : 1;
  int token = 0;
  for (; token + 4 <= inputs.tokens; token += 4)
    few_tiles<BITS, UNITS, CENTRED, RUN, EACH, kTiles, 4>(weight, inputs, token, tile, last, ahead, starts, out, stride);
  if constexpr (RUN == kChunkSteps)
    for (; token + 2 <= inputs.tokens; token += 2)
      few_tiles<BITS, UNITS, CENTRED, RUN, EACH, kTiles, 2>(weight, inputs, token, tile, last, ahead, starts, out, stride);
  for (; token < inputs.tokens; ++token)
    few_tiles<BITS, UNITS, CENTRED, RUN, EACH, kTiles, 1>(weight, inputs, token, tile, last, ahead, starts, out, stride);
}

template <int BITS, Units UNITS, bool CENTRED, int RUN, bool EACH>
void few_tokens(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  constexpr int kTiles = RUN == kChunkSteps ? 2 : 1;
  int32_t* starts = CENTRED && BITS != 8 ? run_starts<RUN>(inputs, weight.cut, weight.zero) : nullptr;
  const int all_tiles = (weight.rows + kTileRows - 1) / kTileRows;
  for (int tile = span.first; tile < span.last; tile += kTiles) {
    const int last = tile + kTiles <= span.last ? kTiles - 1 : 0;  // the only tile that is left takes both places
    const int ahead = tile + 2 * kTiles <= all_tiles ? kTiles : 0;  // the next span's too: somebody takes it at once
    few_tokens_of<BITS, UNITS, CENTRED, RUN, EACH>(weight, inputs, tile, last, ahead, starts, out, stride);
  }
  delete[] starts;
}

}  // namespace
}  // namespace fettle
