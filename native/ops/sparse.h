// Products with pruned weights where skipping does not pay: a tile becomes dense and goes through the dense kernels. Many
// tokens, inputs in float32, single rows; and everything where an instruction set has no sparse kernel of its own.
//
// Included once for each instruction set, behind the dense kernels of that set.
#pragma once

#include <cstring>

#include "formats/sparse.h"
#include "ops/float_matmul.h"
#include "ops/kernels.h"

namespace fettle {
namespace {

// Dense codes of one tile, [padded / 4][8 rows][4] a byte each: codes, or signed units where `units` is given.
inline void scatter_tile(const SparseMatrix& weight, int tile, const int8_t* units, uint8_t* out) {
  const Cut& cut = weight.exact.cut;
  std::memset(out, weight.wide || units != nullptr ? 0 : weight.zero_code, static_cast<size_t>(cut.padded()) * kTileRows);
  const uint16_t* counts = weight.counts + static_cast<int64_t>(tile) * cut.blocks();
  const uint8_t* bases = weight.bases + weight.starts[tile];
  const uint8_t* entries = weight.entries + weight.starts[tile] * weight.step_bytes();
  for (int block = 0; block < cut.blocks(); ++block)
    for (int step = 0; step < counts[block]; ++step, entries += weight.step_bytes()) {
      const int base = block * cut.block + *bases++;
      for (int slot = 0, place = base; slot < kStepBytes; ++slot) {
        const int row = slot / kStepEntries;
        if (slot % kStepEntries == 0) place = base;
        const uint8_t entry = entries[slot];
        place += weight.wide ? entries[kStepBytes + slot / 2] >> (slot % 2 * 4) & 15 : entry & 15;
        const bool nothing = weight.wide ? entry == 0 : entry >> 4 == weight.zero_code;  // as all that is empty
        if (nothing) continue;
        const uint8_t value = weight.wide ? entry : units != nullptr ? static_cast<uint8_t>(units[entry >> 4]) : entry >> 4;
        out[place / kStepColumns * kStepBytes + row * kStepColumns + place % kStepColumns] = value;
      }
    }
}

// Bytes of one tile → the planes of 4 bits that matrix.h says, in place.
inline void pack_nibbles(uint8_t* codes, int padded) {
  uint8_t* to = codes;
  for (int step = 0; step < padded / kStepColumns; step += 2, codes += 2 * kStepBytes, to += kStepBytes)
    for (int lane = 0; lane < kStepBytes; ++lane)
      to[lane] = static_cast<uint8_t>(codes[lane] | codes[kStepBytes + lane] << 4);
}

constexpr int kDenseTiles = 2;  // made dense together; the dense kernels take two

// Tiles first … first + count - 1 as a dense matrix; `room` has space for kDenseTiles tiles of bytes.
inline CodedMatrix dense_tiles(const SparseMatrix& weight, bool rounded, int first, int count, uint8_t* room) {
  CodedMatrix dense = rounded ? weight.rounded : weight.exact;
  const int padded = dense.cut.padded();
  const bool table = dense.bits == 8 && !weight.wide;
  for (int i = 0; i < count; ++i) {
    uint8_t* bytes = room + static_cast<int64_t>(i) * padded * (dense.bits == 8 ? kTileRows : kTileRows / 2);
    scatter_tile(weight, first + i, table ? weight.units : nullptr, bytes);
    if (dense.bits == 4) pack_nibbles(bytes, padded);
  }
  dense.codes = room;
  dense.rows = dense.rows - first * kTileRows < count * kTileRows ? dense.rows - first * kTileRows : count * kTileRows;
  dense.tiles = count;
  const int64_t scales = group_place(dense, first, 0) * number_bytes(dense.scale_type);
  dense.scales = static_cast<const uint8_t*>(dense.scales) + scales;
  return dense;
}

// multiply(dense matrix, its tiles, out) for tiles of a span, made dense one after another.
template <typename Multiply>
inline void through_dense(const SparseMatrix& weight, bool rounded, Span span, float* out, Multiply multiply) {
  const size_t bytes = static_cast<size_t>(weight.exact.cut.padded()) * kTileRows * kDenseTiles;
  uint8_t* room = new uint8_t[bytes + 64];
  for (int tile = span.first; tile < span.last; tile += kDenseTiles) {
    const int count = span.last - tile < kDenseTiles ? span.last - tile : kDenseTiles;
    multiply(dense_tiles(weight, rounded, tile, count, room), Span{0, count}, out + static_cast<int64_t>(tile) * kTileRows);
  }
  delete[] room;
}

void sparse_integer_dense(const SparseMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  through_dense(weight, true, span, out, [&](const CodedMatrix& dense, Span tiles, float* to) {
    coded_integer_matmul(dense, inputs, tiles, to, stride);
  });
}

void sparse_float(const SparseMatrix& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  through_dense(weight, false, span, out, [&](const CodedMatrix& dense, Span tiles, float* to) {
    coded_float_matmul(dense, inputs, tokens, tiles, to, stride);
  });
}

void sparse_row(const SparseMatrix& weight, int row, float* out) {
  const int tile = row / kTileRows;
  through_dense(weight, false, Span{tile, tile + 1}, out,
                [&](const CodedMatrix& dense, Span, float*) { coded_row(dense, row % kTileRows, out); });
}

inline float number_at(const uint8_t* step, Number type, int row) {
  const uint8_t* from = step + kTileRows + number_bytes(type) * row;
  if (type == Number::float32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return type == Number::float16 ? from_float16(bits) : from_bfloat16(bits);
}

// Columns first … first + count - 1 of a tile, out [count][8].
inline void fill_values(const SparseValues& weight, int tile, int first, int count, float* out) {
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(count) * kTileRows);
  int columns[kTileRows] = {};
  const uint8_t* step = weight.entries + weight.starts[tile] * weight.step_bytes();
  for (int64_t i = weight.starts[tile]; i < weight.starts[tile + 1]; ++i, step += weight.step_bytes()) {
    int lowest = weight.columns;
    for (int row = 0; row < kTileRows; ++row) {
      columns[row] += step[row];
      if (columns[row] < lowest) lowest = columns[row];
      if (columns[row] < first || columns[row] >= first + count) continue;
      const float value = number_at(step, weight.type, row);
      if (value != 0) out[(columns[row] - first) * kTileRows + row] = value;
    }
    if (lowest >= first + count) return;
  }
}

void sparse_values_dense(const SparseValues& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  const auto fill = [&](int tile, int first, int count, float* panel) { fill_values(weight, tile, first, count, panel); };
  float_matmul(fill, weight.rows, weight.columns, inputs, tokens, span, out, stride);
}

void sparse_values_row(const SparseValues& weight, int row, float* out) {
  const auto fill = [&](int tile, int first, int count, float* panel) { fill_values(weight, tile, first, count, panel); };
  one_row(fill, row, weight.columns, out);
}

}  // namespace
}  // namespace fettle
