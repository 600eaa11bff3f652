// Codes times bytes with AVX-512 VNNI: vpdpbusd multiplies four unsigned units with four signed inputs and adds all four
// products to a sum of 32 bits, so nothing overflows, nothing is widened, and any unit up to 255 will do.
//
//   dot = start + Σ unit·code  of a block       then        sum += scale · scale_of_inputs · dot         (whole)
//                                               or    sum += scale · (scale_of_inputs · dot - zero · Σ)   (shared, grouped)
//
// A zero point that is one whole number for all is where the dot starts: start = -zero · Σ codes. Codes of 8 bits lie
// signed; with their highest bit turned they are units from 0 to 255, and -128 · Σ codes goes to the start as well.
//
// Two shapes. A few tokens (decoding: memory is the limit) read one tile after the other, which is one stream of memory,
// and unpack it in registers of 256 bits: 32 registers hold the sums of eight tokens. Many tokens (prefill: arithmetic is
// the limit) unpack a panel of 32 rows into the first-level cache and multiply it, two registers of 16 rows, with eight
// tokens at a time: 16 running dots, 10 loads for 16 products. A token's sums are the same operations in the same order
// in both, so chunks, batches and threads change no bit.
#pragma once

#include <cstring>

#include "ops/avx512_intrinsics.h"
#include "ops/integer_registers_avx2.h"
#include "ops/kernels.h"

namespace fettle {
namespace {

enum class Zero : int { whole, shared, grouped };

// What a call needs beside the weight and the codes, [tokens][blocks].
struct Offsets {
  int32_t* starts = nullptr;   // of the dots
  float* shifts = nullptr;     // zero · Σ, of Zero::shared
};

// -offset · Σ codes of each block; the sum is what QuantizedInputs has times its scale, so their quotient is nearly whole.
inline void find_offsets(const QuantizedInputs& inputs, int blocks, float offset, float zero, Offsets& to) {
  const int64_t count = static_cast<int64_t>(inputs.tokens) * blocks;
  to.starts = new int32_t[static_cast<size_t>(count + 8)];
  to.shifts = new float[static_cast<size_t>(count + 8)];
  for (int64_t i = 0; i < count; i += 8) {
    float scales[8] = {}, sums[8] = {};
    const size_t left = static_cast<size_t>(count - i < 8 ? count - i : 8) * sizeof(float);
    std::memcpy(scales, inputs.scales + i, left);
    std::memcpy(sums, inputs.sums + i, left);
    const __m256 scale = _mm256_loadu_ps(scales), sum = _mm256_loadu_ps(sums);
    const __m256 alive = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256 whole = _mm256_and_ps(_mm256_div_ps(sum, scale), alive);
    const __m256i start = _mm256_mullo_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(-static_cast<int>(offset)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.starts + i), start);
    _mm256_storeu_ps(to.shifts + i, _mm256_mul_ps(_mm256_set1_ps(zero), sum));
  }
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

// Chunk → units of 8 steps, unsigned bytes.
template <int BITS, bool LOOKUP>
inline void unpack_units(const uint8_t* planes, __m256i table, __m256i units[kChunkSteps]) {
  unpack_registers<BITS>(planes, units);
  for (int i = 0; i < kChunkSteps; ++i) {
    if constexpr (LOOKUP) units[i] = _mm256_shuffle_epi8(table, units[i]);
    if constexpr (BITS == 8) units[i] = _mm256_xor_si256(units[i], _mm256_set1_epi8(-128));
  }
}

// ---- a few tokens

// sum + scale · (what a block of one token gives); shift: zero · Σ of the block.
template <Zero ZERO>
inline __m256 add_dot(__m256 sum, __m256i dot, __m256 scales, float input_scale, __m256 shift) {
  const __m256 wide = _mm256_cvtepi32_ps(dot);
  if constexpr (ZERO == Zero::whole) return _mm256_fmadd_ps(_mm256_mul_ps(scales, _mm256_set1_ps(input_scale)), wide, sum);
  return _mm256_fmadd_ps(scales, _mm256_fmsub_ps(wide, _mm256_set1_ps(input_scale), shift), sum);
}

// One tile, T tokens from `token` on.
template <int BITS, bool LOOKUP, Zero ZERO, int T>
void few_tile(const CodedMatrix& weight, const QuantizedInputs& inputs, const Offsets& offsets, int token, int tile,
                     __m256 sums[T]) {
  constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;  // a product waits four cycles for the one before it
  const Cut& cut = weight.cut;
  const int padded = cut.padded(), blocks = cut.blocks(), block_halves = cut.block / 16;
  const int group_halves = cut.padded_group / 16;
  const __m256i table = unit_table(weight);
  const int8_t* codes = inputs.codes + static_cast<int64_t>(token) * padded;
  const int64_t first_at = static_cast<int64_t>(token) * blocks;
  __m256i dots[T][kChains];
  const auto start = [&](int64_t block) {
    for (int t = 0; t < T; ++t) {
      dots[t][0] = _mm256_set1_epi32(offsets.starts[first_at + t * blocks + block]);
      for (int chain = 1; chain < kChains; ++chain) dots[t][chain] = _mm256_setzero_si256();
    }
  };
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  start(0);
  __m256 scales = _mm256_setzero_ps(), zeros = _mm256_setzero_ps();
  int left = block_halves, block = 0, group = 0, group_left = 0;
  const uint8_t* planes = chunk_of(weight, tile, 0);
  for (int chunk = 0; chunk < cut.chunks; ++chunk, planes += kChunkColumns * BITS) {
    __m256i units[kChunkSteps];
    for (int line = 0; line < kChunkColumns * BITS; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(planes + 2048 + line), _MM_HINT_T0);
    unpack_units<BITS, LOOKUP>(planes, table, units);
    for (int part = 0; part < 2; ++part, codes += 16) {
      if (group_left == 0) {
        scales = group_scales(weight, tile, group);
        if constexpr (ZERO == Zero::grouped) zeros = group_zeros(weight, tile, group);
        ++group;
        group_left = group_halves;
      }
      --group_left;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        for (int t = 0; t < T; ++t) {
          __m256i& dot = dots[t][i % kChains];
          dot = _mm256_dpbusd_epi32(dot, units[part * 4 + i], repeat_four(codes + static_cast<int64_t>(t) * padded + i * 4));
        }
      if (--left != 0) continue;
      for (int t = 0; t < T; ++t) {
        const int64_t at = first_at + t * blocks + block;
        __m256i dot = dots[t][0];
        for (int chain = 1; chain < kChains; ++chain) dot = _mm256_add_epi32(dot, dots[t][chain]);
        __m256 shift = zeros;
        if constexpr (ZERO == Zero::shared) shift = _mm256_set1_ps(offsets.shifts[at]);
        if constexpr (ZERO == Zero::grouped) shift = _mm256_mul_ps(zeros, _mm256_set1_ps(inputs.sums[at]));
        sums[t] = add_dot<ZERO>(sums[t], dot, scales, inputs.scales[at], shift);
      }
      left = block_halves;
      if (++block < blocks) start(block);
    }
  }
}

template <int BITS, bool LOOKUP, Zero ZERO, int T>
inline void few_rows(const CodedMatrix& weight, const QuantizedInputs& inputs, const Offsets& offsets, int token, int tile,
                     float* out, int64_t stride) {
  __m256 sums[T];
  few_tile<BITS, LOOKUP, ZERO, T>(weight, inputs, offsets, token, tile, sums);
  const int row = tile * kTileRows, count = weight.rows - row < kTileRows ? weight.rows - row : kTileRows;
  for (int t = 0; t < T; ++t) {
    float rows[kTileRows];
    _mm256_storeu_ps(rows, _mm256_mul_ps(sums[t], _mm256_set1_ps(weight.gain * weight.unit_size)));
    std::memcpy(out + (token + t) * stride + row, rows, static_cast<size_t>(count) * sizeof(float));
  }
}

template <int BITS, bool LOOKUP, Zero ZERO>
void few_tokens(const CodedMatrix& weight, const QuantizedInputs& inputs, const Offsets& offsets, Span span, float* out,
                int64_t stride) {
  for (int tile = span.first; tile < span.last; ++tile) {
    int t = 0;
    for (; t + 8 <= inputs.tokens; t += 8) few_rows<BITS, LOOKUP, ZERO, 8>(weight, inputs, offsets, t, tile, out, stride);
    for (; t + 4 <= inputs.tokens; t += 4) few_rows<BITS, LOOKUP, ZERO, 4>(weight, inputs, offsets, t, tile, out, stride);
    for (; t + 2 <= inputs.tokens; t += 2) few_rows<BITS, LOOKUP, ZERO, 2>(weight, inputs, offsets, t, tile, out, stride);
    if (t < inputs.tokens) few_rows<BITS, LOOKUP, ZERO, 1>(weight, inputs, offsets, t, tile, out, stride);
  }
}

// ---- many tokens

constexpr int kVnniChunks = 16;                // of a panel: 512 columns of 32 rows are 16 kB of units
constexpr int kVnniRows = 16;                  // of a register
constexpr int kVnniTokens = 128;               // that a panel serves before the next: unpacking it costs 3% of that

struct VnniPanel {
  alignas(64) uint8_t units[kVnniChunks * kChunkSteps * 4 * kStepBytes];  // [steps][V registers][16 rows][4 columns]
  alignas(64) float scales[2 * kVnniChunks][2 * kVnniRows];               // of each block [V · 16]
  alignas(64) float zeros[2 * kVnniChunks][2 * kVnniRows];
};

template <Zero ZERO>
inline __m512 add_dots(__m512 sum, __m512i dot, __m512 scales, float input_scale, __m512 shift) {
  const __m512 wide = _mm512_cvtepi32_ps(dot);
  if constexpr (ZERO == Zero::whole) return _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(input_scale)), wide, sum);
  return _mm512_fmadd_ps(scales, _mm512_fmsub_ps(wide, _mm512_set1_ps(input_scale), shift), sum);
}

// 16·V rows × T tokens over the blocks of a panel; sums [T][16·V]. Not inlined: one for all widths of codes.
template <Zero ZERO, int V, int T>
__attribute__((noinline)) void multiply_panel_units(const VnniPanel& panel, const QuantizedInputs& inputs, const Offsets& offsets, int token,
                                 int first_block, int blocks, const Cut& cut, float* sums) {
  const int64_t padded = cut.padded(), all_blocks = cut.blocks(), at = token * all_blocks + first_block;
  const int quads = cut.block / 16;
  const int8_t* codes = inputs.codes + token * padded + first_block * cut.block;
  const uint8_t* units = panel.units;
  const int32_t* starts = offsets.starts + at;
  const float *input_scales = inputs.scales + at, *shifts = ZERO == Zero::shared ? offsets.shifts + at : inputs.sums + at;
  for (int block = 0; block < blocks; ++block) {
    asm volatile("" : : : "memory");  // or the compiler keeps the 16 sums in registers too, and there are 32
    __m512i dots[T][V];
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) dots[t][v] = _mm512_set1_epi32(starts[t * all_blocks + block]);
    for (int quad = 0; quad < quads; ++quad, codes += 16, units += 4 * V * 64) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __m512i rows[V];
        for (int v = 0; v < V; ++v) rows[v] = _mm512_load_si512(units + (i * V + v) * 64);
        for (int t = 0; t < T; ++t) {
          int32_t four;
          std::memcpy(&four, codes + t * padded + i * kStepColumns, sizeof four);
          const __m512i x = _mm512_set1_epi32(four);
          for (int v = 0; v < V; ++v) dots[t][v] = _mm512_dpbusd_epi32(dots[t][v], rows[v], x);
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const float input_scale = input_scales[t * all_blocks + block], shared = shifts[t * all_blocks + block];
      for (int v = 0; v < V; ++v) {
        const __m512 scales = _mm512_load_ps(panel.scales[block] + v * kVnniRows);
        float* sum = sums + (t * V + v) * kVnniRows;
        __m512 shift = _mm512_set1_ps(shared);
        if constexpr (ZERO == Zero::grouped) shift = _mm512_mul_ps(_mm512_load_ps(panel.zeros[block] + v * kVnniRows), shift);
        _mm512_store_ps(sum, add_dots<ZERO>(_mm512_load_ps(sum), dots[t][v], scales, input_scale, shift));
      }
    }
  }
}

// A tile's part of a panel; side: which 8 of the rows of so many registers.
template <int BITS, bool LOOKUP>
void fill_panel(const CodedMatrix& weight, int tile, int first_block, int blocks, int registers, int side, VnniPanel& panel) {
  const Cut& cut = weight.cut;
  const __m256i table = unit_table(weight);
  const int first = first_block * cut.block / kChunkColumns, last = (first_block + blocks) * cut.block / kChunkColumns;
  uint8_t* to = panel.units + side * kStepBytes;
  for (int chunk = first; chunk < last; ++chunk) {
    __m256i units[kChunkSteps];
    unpack_units<BITS, LOOKUP>(chunk_of(weight, tile, chunk), table, units);
    for (int i = 0; i < kChunkSteps; ++i, to += registers * 64) _mm256_store_si256(reinterpret_cast<__m256i*>(to), units[i]);
  }
  for (int block = 0; block < blocks; ++block) {
    const int group = (first_block + block) * cut.block / cut.padded_group;
    _mm256_store_ps(panel.scales[block] + side * kTileRows, group_scales(weight, tile, group));
    _mm256_store_ps(panel.zeros[block] + side * kTileRows, group_zeros(weight, tile, group));
  }
}

using Fill = void (*)(const CodedMatrix&, int tile, int first_block, int blocks, int registers, int side, VnniPanel&);

// Tiles from `tile` on, as many as 16·V rows have or `last` leaves; tokens first … end-1.
template <Zero ZERO, int V>
void panel_rows(Fill fill, const CodedMatrix& weight, const QuantizedInputs& inputs, const Offsets& offsets, int tile, int last,
                int first, int end, VnniPanel& panel, float* sums, float* out, int64_t stride) {
  constexpr int kRows = kVnniRows * V;
  const Cut& cut = weight.cut;
  const int step = kVnniChunks * kChunkColumns / cut.block / 2 * 2;  // blocks of a panel, whole chunks
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(end - first) * kRows);
  for (int block = 0; block < cut.blocks(); block += step) {
    const int blocks = cut.blocks() - block < step ? cut.blocks() - block : step;
    for (int side = 0; side < 2 * V; ++side)  // a tile that is not there is the last one once more
      fill(weight, tile + side < last ? tile + side : last - 1, block, blocks, V, side, panel);
    int t = first;
    float* sum = sums;
    for (; t + 8 <= end; t += 8, sum += 8 * kRows)
      multiply_panel_units<ZERO, V, 8>(panel, inputs, offsets, t, block, blocks, cut, sum);
    for (; t + 4 <= end; t += 4, sum += 4 * kRows)
      multiply_panel_units<ZERO, V, 4>(panel, inputs, offsets, t, block, blocks, cut, sum);
    for (; t < end; ++t, sum += kRows)
      multiply_panel_units<ZERO, V, 1>(panel, inputs, offsets, t, block, blocks, cut, sum);
  }
  const int row = tile * kTileRows, here = (last - tile) * kTileRows < kRows ? (last - tile) * kTileRows : kRows;
  const int count = weight.rows - row < here ? weight.rows - row : here;
  const __m512 gain = _mm512_set1_ps(weight.gain * weight.unit_size);
  for (int t = first; t < end; ++t, sums += kRows) {
    for (int v = 0; v < V; ++v) _mm512_store_ps(sums + v * kVnniRows, _mm512_mul_ps(_mm512_load_ps(sums + v * kVnniRows), gain));
    std::memcpy(out + t * stride + row, sums, static_cast<size_t>(count) * sizeof(float));
  }
}

template <Zero ZERO>
void many_tokens(Fill fill, const CodedMatrix& weight, const QuantizedInputs& inputs, const Offsets& offsets, Span span, float* out,
                 int64_t stride) {
  VnniPanel* panel = new VnniPanel;
  alignas(64) float sums[kVnniTokens * 2 * kVnniRows];
  for (int first = 0; first < inputs.tokens; first += kVnniTokens) {
    const int end = first + kVnniTokens < inputs.tokens ? first + kVnniTokens : inputs.tokens;
    for (int tile = span.first; tile < span.last; tile += 4) {
      const bool wide = span.last - tile > 2;
      const auto rows = wide ? panel_rows<ZERO, 2> : panel_rows<ZERO, 1>;
      rows(fill, weight, inputs, offsets, tile, span.last, first, end, *panel, sums, out, stride);
    }
  }
  delete panel;
}

// ---- which of them

constexpr int kVnniFew = 8;  // tokens whose sums fit the registers of one tile

template <int BITS, bool LOOKUP, Zero ZERO>
void vnni_matmul(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  const float offset = (ZERO == Zero::whole ? weight.zero : 0.0f) + (BITS == 8 ? 128.0f : 0.0f);
  Offsets offsets;
  find_offsets(inputs, weight.cut.blocks(), offset, weight.zero, offsets);
  if (inputs.tokens <= kVnniFew) {
    few_tokens<BITS, LOOKUP, ZERO>(weight, inputs, offsets, span, out, stride);
  } else {
    many_tokens<ZERO>(fill_panel<BITS, LOOKUP>, weight, inputs, offsets, span, out, stride);
  }
  delete[] offsets.starts;
  delete[] offsets.shifts;
}

template <int BITS>
inline void choose_vnni(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  const bool whole = weight.zero == static_cast<float>(static_cast<int>(weight.zero)) && weight.zero >= -256 && weight.zero <= 256;
  if constexpr (BITS <= 4) {
    if (!weight.equal_steps) {
      if (weight.zeros != nullptr) return vnni_matmul<BITS, true, Zero::grouped>(weight, inputs, span, out, stride);
      return vnni_matmul<BITS, true, Zero::shared>(weight, inputs, span, out, stride);
    }
  }
  if (weight.zeros != nullptr) return vnni_matmul<BITS, false, Zero::grouped>(weight, inputs, span, out, stride);
  if (whole) return vnni_matmul<BITS, false, Zero::whole>(weight, inputs, span, out, stride);
  vnni_matmul<BITS, false, Zero::shared>(weight, inputs, span, out, stride);
}

void coded_integer_vnni(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  switch (weight.bits) {
    case 1: return choose_vnni<1>(weight, inputs, span, out, stride);
    case 2: return choose_vnni<2>(weight, inputs, span, out, stride);
    case 3: return choose_vnni<3>(weight, inputs, span, out, stride);
    case 4: return choose_vnni<4>(weight, inputs, span, out, stride);
    case 5: return choose_vnni<5>(weight, inputs, span, out, stride);
    case 6: return choose_vnni<6>(weight, inputs, span, out, stride);
    case 7: return choose_vnni<7>(weight, inputs, span, out, stride);
    default: return choose_vnni<8>(weight, inputs, span, out, stride);
  }
}

}  // namespace
}  // namespace fettle
