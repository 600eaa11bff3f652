// The kernels for any processor: what the others are compared with, and what runs where there is nothing better.

#include <cstring>

#include "ops/attention.h"
#include "ops/float_matmul.h"
#include "ops/kernels.h"
#include "ops/quantize_inputs.h"
#include "ops/rows.h"

namespace fettle {
namespace {

// Codes of one block of a tile as units: [block / 4 steps][8 rows][4 columns].
void units_of_block(const CodedMatrix& weight, int tile, int block, int16_t* units) {
  const int columns = weight.cut.block, first = block * columns;
  uint8_t codes[kChunkSteps * kStepBytes];
  for (int column = 0; column < columns; column += kStepColumns) {
    const int place = first + column;
    if (column == 0 || place % kChunkColumns == 0)
      unpack_codes(chunk_of(weight, tile, place / kChunkColumns), weight.bits, codes);
    const uint8_t* step = codes + place % kChunkColumns / kStepColumns * kStepBytes;
    for (int i = 0; i < kStepBytes; ++i) {
      const int unit = weight.equal_steps ? step[i] - (weight.bits == 8 ? 128 : 0) : weight.units[step[i] & 15];
      *units++ = static_cast<int16_t>(unit);
    }
  }
}

void coded_integer_matmul(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  const Cut& cut = weight.cut;
  const int blocks = cut.blocks(), steps = cut.block / kStepColumns;
  const float gain = weight.gain * weight.unit_size;
  int16_t units[4 * kChunkSteps * kStepBytes];
  Floats* sums = new Floats[static_cast<size_t>(inputs.tokens)];
  for (int tile = span.first; tile < span.last; ++tile) {
    for (int t = 0; t < inputs.tokens; ++t) sums[t] = Floats{};
    for (int block = 0; block < blocks; ++block) {
      units_of_block(weight, tile, block, units);
      const int group = block * cut.block / cut.padded_group;
      const Floats scales = group_scales(weight, tile, group), zeros = group_zeros(weight, tile, group);
      for (int t = 0; t < inputs.tokens; ++t) {
        const int8_t* codes = inputs.codes + static_cast<int64_t>(t) * cut.padded() + block * cut.block;
        Ints dot = {};
        for (int step = 0; step < steps; ++step)
          for (int row = 0; row < kTileRows; ++row)
            for (int j = 0; j < kStepColumns; ++j)
              dot[row] += units[step * kStepBytes + row * kStepColumns + j] * codes[step * kStepColumns + j];
        const int64_t at = static_cast<int64_t>(t) * blocks + block;
        const Floats centred = __builtin_convertvector(dot, Floats) * inputs.scales[at] - zeros * inputs.sums[at];
        sums[t] += scales * centred;
      }
    }
    for (int t = 0; t < inputs.tokens; ++t)
      for (int row = 0; row < kTileRows && tile * kTileRows + row < weight.rows; ++row)
        out[t * stride + tile * kTileRows + row] = sums[t][row] * gain;
  }
  delete[] sums;
}

}  // namespace
}  // namespace fettle

#include "ops/sparse.h"  // behind the dense product that it calls

namespace fettle {
namespace {

uint64_t read_bytes(const uint8_t* from, int64_t bytes) {
  uint64_t total = 0, word;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    std::memcpy(&word, from + i, sizeof word);
    total ^= word;
  }
  return total;
}

int64_t multiply_adds(int64_t rounds) {
  volatile int32_t factor = 3;
  int32_t sums[16] = {};
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < 16; ++i) sums[i] += factor * static_cast<int32_t>(round + i);
  volatile int32_t kept = 0;
  for (int i = 0; i < 16; ++i) kept = kept + sums[i];
  return rounds * 16;
}

}  // namespace

void portable_sparse_integer(const SparseMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  sparse_integer_dense(weight, inputs, span, out, stride);
}
void portable_sparse_float(const SparseMatrix& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  sparse_float(weight, inputs, tokens, span, out, stride);
}
void portable_sparse_values(const SparseValues& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  sparse_values_dense(weight, inputs, tokens, span, out, stride);
}
void portable_sparse_row(const SparseMatrix& weight, int row, float* out) { sparse_row(weight, row, out); }
void portable_sparse_values_row(const SparseValues& weight, int row, float* out) { sparse_values_row(weight, row, out); }

const Kernels& portable_kernels() {
  static const Kernels table = {
      "portable", quantize_inputs, coded_integer_matmul, coded_float_matmul, dense_matmul, coded_row, dense_row,
      rms_norm, layer_norm, rotate, activate, soft_cap, attend, read_bytes, multiply_adds, store_keys_values,
  };
  return table;
}

}  // namespace fettle
