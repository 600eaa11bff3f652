// Pruned weights times a few tokens with AVX2: what went is neither read nor multiplied.
//
// Codes: a product with 0x01010101 sums the distances of a row's four entries up to columns of the window; one shuffle for
// each 16 columns of inputs fetches what 32 entries multiply, the codes become signed units by another, and maddubs
// multiplies |unit| with the input that has the unit's sign. Sums of a block are whole numbers, added up as the dense
// kernel of signed units or of a zero point in the middle adds them, so many tokens, which go through that, give the same
// to the bit.
//
// Values: a gather fetches the inputs of eight rows, and a fused multiply-add takes them in the order of columns.
#pragma once

#include <immintrin.h>

#include "ops/integer_avx2.h"
#include "ops/sparse.h"

namespace fettle {
namespace {

constexpr int kFewSparse = 8;  // tokens up to which skipping costs less than a dense tile

// Inputs at the columns of a window of 16·N, which begins at `from`.
template <int N>
inline __m256i fetch(const int8_t* from, __m256i columns) {
  if constexpr (N == 1) {
    const __m256i inputs = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_shuffle_epi8(inputs, columns);
  } else {
    // a bit of the column chooses the half; the shift brings it to the top of its byte
    const __m256i low = fetch<N / 2>(from, columns), high = fetch<N / 2>(from + 8 * N, columns);
    return _mm256_blendv_epi8(low, high, _mm256_slli_epi16(columns, N == 2 ? 3 : 2));
  }
}

template <bool WIDE>
inline void read_step(const uint8_t* entries, __m256i table, __m256i* columns, __m256i* units) {
  const __m256i low = _mm256_set1_epi8(15), bytes = load_bytes(entries);
  __m256i distances;
  if constexpr (WIDE) {
    const __m256i two = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + kStepBytes)));
    distances = _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi16(two, 4)), low);
    *units = bytes;
  } else {
    distances = _mm256_and_si256(bytes, low);
    *units = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
  }
  *columns = _mm256_mullo_epi32(distances, _mm256_set1_epi32(0x01010101));
}

// One tile, T tokens from `token` on; windows of 16·N columns.
template <int N, bool WIDE, int T>
inline void few_sparse_tile(const SparseMatrix& weight, const QuantizedInputs& inputs, int token, int tile, __m256 sums[T]) {
  constexpr int kBytes = WIDE ? kStepBytes + kStepBytes / 2 : kStepBytes;
  const Cut& cut = weight.exact.cut;
  const int padded = cut.padded(), blocks = cut.blocks(), group_blocks = cut.padded_group / cut.block;
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.units)));
  const uint16_t* counts = weight.counts + static_cast<int64_t>(tile) * blocks;
  const uint8_t* bases = weight.bases + weight.starts[tile];
  const uint8_t* entries = weight.entries + weight.starts[tile] * kBytes;
  const int8_t* codes = inputs.codes + static_cast<int64_t>(token) * padded;
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  __m256 scales = _mm256_setzero_ps();
  for (int block = 0, left = 0, group = 0; block < blocks; ++block, --left, codes += cut.block) {
    if (left == 0) {
      scales = group_scales(weight.exact, tile, group++);
      left = group_blocks;
    }
    __m256i dots[T];
    for (int t = 0; t < T; ++t) dots[t] = _mm256_setzero_si256();
    for (int step = counts[block]; step > 0; --step, entries += kBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(entries + 2048), _MM_HINT_T0);
      __m256i columns, units;
      read_step<WIDE>(entries, table, &columns, &units);
      const __m256i sizes = _mm256_abs_epi8(units);
      const int8_t* from = codes + *bases++;
      for (int t = 0; t < T; ++t) {
        const __m256i signs = _mm256_sign_epi8(fetch<N>(from + static_cast<int64_t>(t) * padded, columns), units);
        dots[t] = _mm256_add_epi32(dots[t], widen_pairs(_mm256_maddubs_epi16(sizes, signs)));
      }
    }
    for (int t = 0; t < T; ++t) {
      const int64_t at = static_cast<int64_t>(token + t) * blocks + block;
      sums[t] = add_block<true>(sums[t], dots[t], scales, scales, inputs.scales[at], 0);
    }
  }
}

template <int N, bool WIDE, int T>
void few_sparse(const SparseMatrix& weight, const QuantizedInputs& inputs, int token, Span span, float* out, int64_t stride) {
  const __m256 gain = _mm256_set1_ps(weight.rounded.gain * weight.rounded.unit_size);
  for (int tile = span.first; tile < span.last; ++tile) {
    __m256 sums[T];
    few_sparse_tile<N, WIDE, T>(weight, inputs, token, tile, sums);
    const int row = tile * kTileRows;
    for (int t = 0; t < T; ++t)
      store_rows(out + (token + t) * stride + row, _mm256_mul_ps(sums[t], gain), weight.rounded.rows - row);
  }
}

template <int N, bool WIDE>
void all_sparse(const SparseMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  int token = 0;
  for (; token + 4 <= inputs.tokens; token += 4) few_sparse<N, WIDE, 4>(weight, inputs, token, span, out, stride);
  if (token + 2 <= inputs.tokens) {
    few_sparse<N, WIDE, 2>(weight, inputs, token, span, out, stride);
    token += 2;
  }
  if (token < inputs.tokens) few_sparse<N, WIDE, 1>(weight, inputs, token, span, out, stride);
}

void sparse_integer(const SparseMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  if (inputs.tokens > kFewSparse) return sparse_integer_dense(weight, inputs, span, out, stride);
  switch (weight.window + weight.wide) {
    case 32: return all_sparse<2, false>(weight, inputs, span, out, stride);
    case 33: return all_sparse<2, true>(weight, inputs, span, out, stride);
    case 64: return all_sparse<4, false>(weight, inputs, span, out, stride);
    default: return all_sparse<4, true>(weight, inputs, span, out, stride);
  }
}

inline __m256 read_numbers(const uint8_t* from, Number type) {
  if (type == Number::float32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (type == Number::float16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// One tile, T tokens: sums in the order of columns, as float_matmul.h has it.
template <int T>
inline void few_values(const SparseValues& weight, const float* inputs, int tile, float* out, int64_t stride) {
  const int bytes = weight.step_bytes();
  const Number type = weight.type;
  __m256 sums[T];
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  __m256i columns = _mm256_setzero_si256();
  const uint8_t* step = weight.entries + weight.starts[tile] * bytes;
  const uint8_t* end = weight.entries + weight.starts[tile + 1] * bytes;
  for (; step < end; step += bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(step + 1536), _MM_HINT_T0);
    columns = _mm256_add_epi32(columns, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(step))));
    const __m256 numbers = read_numbers(step + kTileRows, type);
    for (int t = 0; t < T; ++t) {
      const __m256 x = _mm256_i32gather_ps(inputs + static_cast<int64_t>(t) * weight.columns, columns, 4);
      sums[t] = _mm256_fmadd_ps(numbers, x, sums[t]);
    }
  }
  for (int t = 0; t < T; ++t) store_rows(out + t * stride + tile * kTileRows, sums[t], weight.rows - tile * kTileRows);
}

void sparse_values(const SparseValues& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  if (tokens > kFewSparse) return sparse_values_dense(weight, inputs, tokens, span, out, stride);
  for (int tile = span.first; tile < span.last; ++tile) {
    int t = 0;
    for (; t + 4 <= tokens; t += 4) few_values<4>(weight, inputs + static_cast<int64_t>(t) * weight.columns, tile, out + t * stride, stride);
    for (; t < tokens; ++t) few_values<1>(weight, inputs + static_cast<int64_t>(t) * weight.columns, tile, out + t * stride, stride);
  }
}

}  // namespace
}  // namespace fettle
