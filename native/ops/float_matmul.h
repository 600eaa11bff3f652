// Products with float32 inputs: a panel of the weight becomes float32 in the first-level cache, whatever its format, and
// all tokens are multiplied with it. A sum runs over the columns in order, so no token depends on how many there are.
//
// Included once for each instruction set.
#pragma once

#include <cstring>

#include "ops/kernels.h"
#include "ops/unpack.h"

namespace fettle {
namespace {

constexpr int kPanelColumns = 256;  // times 16 rows: 16 kB of float32
constexpr int kPanelRows = 2 * kTileRows;

// sums [T][16] += inputs [T][columns] · panel [2][columns][8]
template <int T>
inline void multiply_panel(const float* panel, int columns, const float* inputs, int64_t stride, float* sums) {
  Floats low[T], high[T];
  for (int t = 0; t < T; ++t) {
    low[t] = load(sums + t * kPanelRows);
    high[t] = load(sums + t * kPanelRows + 8);
  }
  const float* second = panel + kPanelColumns * kTileRows;
  for (int k = 0; k < columns; ++k) {
    const Floats a = load(panel + k * 8), b = load(second + k * 8);
    for (int t = 0; t < T; ++t) {
      const Floats x = all(inputs[t * stride + k]);
      low[t] += a * x;
      high[t] += b * x;
    }
  }
  for (int t = 0; t < T; ++t) {
    store(sums + t * kPanelRows, low[t]);
    store(sums + t * kPanelRows + 8, high[t]);
  }
}

inline void multiply_panel_all(const float* panel, int columns, const float* inputs, int64_t stride, int tokens, float* sums) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) multiply_panel<4>(panel, columns, inputs + t * stride, stride, sums + t * kPanelRows);
  for (; t < tokens; ++t) multiply_panel<1>(panel, columns, inputs + t * stride, stride, sums + t * kPanelRows);
}

// sums [tokens][16] → out, as far as there are rows.
inline void write_rows(const float* sums, int tokens, int row, int rows, float* out, int64_t stride) {
  const int count = rows - row < kPanelRows ? rows - row : kPanelRows;
  for (int t = 0; t < tokens; ++t)
    std::memcpy(out + t * stride + row, sums + t * kPanelRows, sizeof(float) * static_cast<size_t>(count));
}

// fill(tile, first column, count, float [count][8])
template <typename Fill>
void float_matmul(Fill fill, int rows, int columns, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  alignas(32) float panel[2 * kPanelColumns * kTileRows];
  float* sums = new float[static_cast<size_t>(tokens) * kPanelRows];
  for (int tile = span.first; tile < span.last; tile += 2) {
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(tokens) * kPanelRows);
    for (int first = 0; first < columns; first += kPanelColumns) {
      const int count = columns - first < kPanelColumns ? columns - first : kPanelColumns;
      fill(tile, first, count, panel);
      if (tile + 1 < span.last) {
        fill(tile + 1, first, count, panel + kPanelColumns * kTileRows);
      } else {
        std::memset(panel + kPanelColumns * kTileRows, 0, sizeof(float) * static_cast<size_t>(count) * kTileRows);
      }
      multiply_panel_all(panel, count, inputs + first, columns, tokens, sums);
    }
    const int last_row = span.last * kTileRows < rows ? span.last * kTileRows : rows;
    write_rows(sums, tokens, tile * kTileRows, last_row, out, stride);
  }
  delete[] sums;
}

inline void fill_dense(const DenseMatrix& weight, int tile, int first, int count, float* out) {
  const int64_t start = (static_cast<int64_t>(tile) * weight.columns + first) * kTileRows;
  for (int k = 0; k < count; ++k) store(out + k * 8, load_number(weight.values, weight.type, start + k * 8));
}

inline void fill_coded(const CodedMatrix& weight, int tile, int first, int count, float* out) {
  const Cut& cut = weight.cut;
  uint8_t codes[kChunkSteps * kStepBytes];
  int chunk = -1, group = -1;
  Floats scales = {}, zeros = {};
  for (int k = 0; k < count; ++k) {
    const int column = first + k;
    if (column / cut.group != group) {
      group = column / cut.group;
      scales = group_scales(weight, tile, group);
      if (weight.zeros != nullptr)
        for (int row = 0; row < kTileRows; ++row)
          zeros[row] = weight.levels[weight.zeros[group_place(weight, tile, group) + row]];
    }
    const int place = group * cut.padded_group + column % cut.group;
    if (place / kChunkColumns != chunk) {
      chunk = place / kChunkColumns;
      unpack_codes(chunk_of(weight, tile, chunk), weight.bits, codes);
    }
    const uint8_t* step = codes + place % kChunkColumns / kStepColumns * kStepBytes + place % kStepColumns;
    Floats values;
    for (int row = 0; row < kTileRows; ++row) values[row] = weight.levels[step[row * kStepColumns]];
    store(out + k * 8, round_to((values - zeros) * scales, weight.rounding) * weight.gain);
  }
}

// TILES tiles and T tokens without a panel: a value is used too few times to be kept. The same sums in the same order.
template <int TILES, int T>
inline void multiply_values(const DenseMatrix& weight, int tile, const float* inputs, float* out, int64_t stride) {
  Floats sums[TILES][T];
  int64_t start[TILES];
  for (int r = 0; r < TILES; ++r) {
    start[r] = static_cast<int64_t>(tile + r) * weight.columns * kTileRows;
    for (int t = 0; t < T; ++t) sums[r][t] = Floats{};
  }
  for (int k = 0; k < weight.columns; ++k)
    for (int r = 0; r < TILES; ++r) {
      const Floats values = load_number(weight.values, weight.type, start[r] + k * 8);
      for (int t = 0; t < T; ++t) sums[r][t] += values * all(inputs[static_cast<int64_t>(t) * weight.columns + k]);
    }
  for (int r = 0; r < TILES; ++r)
    for (int t = 0; t < T; ++t)
      for (int row = 0; row < kTileRows && (tile + r) * kTileRows + row < weight.rows; ++row)
        out[t * stride + (tile + r) * kTileRows + row] = sums[r][t][row];
}

template <int T>
inline void few_dense(const DenseMatrix& weight, const float* inputs, Span span, float* out, int64_t stride) {
  constexpr int kTiles = T == 1 ? 4 : 2;
  int tile = span.first;
  for (; tile + kTiles <= span.last; tile += kTiles) multiply_values<kTiles, T>(weight, tile, inputs, out, stride);
  for (; tile < span.last; ++tile) multiply_values<1, T>(weight, tile, inputs, out, stride);
}

void dense_matmul(const DenseMatrix& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  if (tokens == 1) return few_dense<1>(weight, inputs, span, out, stride);
  if (tokens == 2) return few_dense<2>(weight, inputs, span, out, stride);
  const auto fill = [&](int tile, int first, int count, float* panel) { fill_dense(weight, tile, first, count, panel); };
  float_matmul(fill, weight.rows, weight.columns, inputs, tokens, span, out, stride);
}

void coded_float_matmul(const CodedMatrix& weight, const float* inputs, int tokens, Span span, float* out, int64_t stride) {
  const auto fill = [&](int tile, int first, int count, float* panel) { fill_coded(weight, tile, first, count, panel); };
  float_matmul(fill, weight.rows, weight.cut.columns, inputs, tokens, span, out, stride);
}

// One row of values, such as a token's embedding.
template <typename Fill>
void one_row(Fill fill, int row, int columns, float* out) {
  float panel[kPanelColumns * kTileRows];
  for (int first = 0; first < columns; first += kPanelColumns) {
    const int count = columns - first < kPanelColumns ? columns - first : kPanelColumns;
    fill(row / kTileRows, first, count, panel);
    for (int k = 0; k < count; ++k) out[first + k] = panel[k * kTileRows + row % kTileRows];
  }
}

void dense_row(const DenseMatrix& weight, int row, float* out) {
  const auto fill = [&](int tile, int first, int count, float* panel) { fill_dense(weight, tile, first, count, panel); };
  one_row(fill, row, weight.columns, out);
}

void coded_row(const CodedMatrix& weight, int row, float* out) {
  const auto fill = [&](int tile, int first, int count, float* panel) { fill_coded(weight, tile, first, count, panel); };
  one_row(fill, row, weight.cut.columns, out);
}

}  // namespace
}  // namespace fettle
