#include "formats/dense.h"

#include <algorithm>
#include <stdexcept>

namespace fettle {
namespace {

template <typename T>
void lay_out(const T* from, T* to, int rows, int columns, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    const T* own = from + tile * kTileRows * columns;
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, rows - tile * kTileRows));
    T* out = to + tile * kTileRows * columns;
    if (count == kTileRows) {
      for (int column = 0; column < columns; ++column, out += kTileRows)
        for (int row = 0; row < kTileRows; ++row) out[row] = own[static_cast<int64_t>(row) * columns + column];
      continue;
    }
    for (int column = 0; column < columns; ++column, out += kTileRows)
      for (int row = 0; row < kTileRows; ++row) out[row] = row < count ? own[static_cast<int64_t>(row) * columns + column] : T{0};
  }
}

}  // namespace

Dense::Dense(const void* values, Number type, int rows, int columns, ThreadPool& pool) {
  if (rows < 1 || columns < 1) throw std::invalid_argument("a weight has at least one row and one column");
  view_.rows = rows;
  view_.columns = columns;
  view_.tiles = (rows + kTileRows - 1) / kTileRows;
  view_.type = type;
  values_ = Storage(static_cast<size_t>(view_.tiles) * kTileRows * columns * number_bytes(type));
  view_.values = values_.data();
  pool.run(view_.tiles, 4, [&](int64_t first, int64_t last) {
    if (type == Number::float32) {
      lay_out(static_cast<const float*>(values), reinterpret_cast<float*>(values_.data()), rows, columns, first, last);
    } else {
      lay_out(static_cast<const uint16_t*>(values), reinterpret_cast<uint16_t*>(values_.data()), rows, columns, first,
              last);
    }
  });
}

}  // namespace fettle
