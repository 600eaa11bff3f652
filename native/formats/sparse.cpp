#include "formats/sparse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace fettle {
namespace {

// What stayed of a tile's rows in one block of padded columns: places in the block, and columns of the weight.
struct BlockRows {
  std::vector<int> places[kTileRows], columns[kTileRows];
};

void read_block(const Cut& cut, const uint8_t* kept, int rows, int tile, int block, BlockRows* found) {
  const int start = block * cut.block, group = start / cut.padded_group;
  const int first = group * cut.group + start % cut.padded_group;  // column of the weight
  const int end = std::min({first + cut.block, (group + 1) * cut.group, cut.columns});
  for (int i = 0; i < kTileRows; ++i) {
    found->places[i].clear();
    found->columns[i].clear();
    const int row = tile * kTileRows + i;
    if (row >= rows) continue;
    const uint8_t* mask = kept + static_cast<size_t>(row) * cut.columns;
    for (int column = first; column < end; ++column) {
      if (!mask[column]) continue;
      found->places[i].push_back(column - first);
      found->columns[i].push_back(column);
    }
  }
}

// Goes through the steps of a block; begin(base), then entry(row, slot, distance, column) for each, column -1 on the way.
// Returns how many there are.
template <typename Begin, typename Entry>
int schedule(const BlockRows& rows, int block, int window, Begin begin, Entry entry) {
  size_t next[kTileRows] = {};
  for (int steps = 0;; ++steps) {
    int base = block;
    for (int row = 0; row < kTileRows; ++row)
      if (next[row] < rows.places[row].size()) base = std::min(base, rows.places[row][next[row]]);
    if (base == block) return steps;
    begin(base);
    for (int row = 0; row < kTileRows; ++row) {
      int last = base;
      for (int slot = 0; slot < kStepEntries && next[row] < rows.places[row].size(); ++slot) {
        const int place = rows.places[row][next[row]];
        if (place >= base + window) break;
        if (place - last > kFarthest) {
          entry(row, slot, kFarthest, -1);
          last += kFarthest;
          continue;
        }
        entry(row, slot, place - last, rows.columns[row][next[row]]);
        last = place;
        ++next[row];
      }
    }
  }
}

template <typename T>
bool is_zero(T value) {
  return value == 0;
}
template <>
bool is_zero(uint16_t bits) {
  return (bits & 0x7fff) == 0;
}

// Walks what stayed of one row of numbers: entry(distance, column), column -1 on the way.
template <typename T, typename Entry>
void walk_numbers(const T* row, int columns, Entry entry) {
  int last = 0;
  for (int column = 0; column < columns; ++column) {
    if (is_zero(row[column])) continue;
    for (; column - last > kFarthestValue; last += kFarthestValue) entry(kFarthestValue, -1);
    entry(column - last, column);
    last = column;
  }
}

template <typename T>
int64_t count_numbers(const T* values, int rows, int columns, int tile) {
  int64_t most = 0;
  for (int row = tile * kTileRows; row < std::min((tile + 1) * kTileRows, rows); ++row) {
    int64_t entries = 0;
    walk_numbers(values + static_cast<size_t>(row) * columns, columns, [&](int, int) { ++entries; });
    most = std::max(most, entries);
  }
  return most;
}

template <typename T>
void lay_out_numbers(const T* values, const SparseValues& view, int tile, uint8_t* to) {
  const int last = std::min((tile + 1) * kTileRows, view.rows), bytes = view.step_bytes();
  for (int row = tile * kTileRows; row < last; ++row) {
    const T* from = values + static_cast<size_t>(row) * view.columns;
    uint8_t* step = to;
    walk_numbers(from, view.columns, [&](int distance, int column) {
      step[row % kTileRows] = static_cast<uint8_t>(distance);
      const T value = column < 0 ? T{0} : from[column];
      std::memcpy(step + kTileRows + sizeof(T) * (row % kTileRows), &value, sizeof(T));
      step += bytes;
    });
  }
}

}  // namespace

SparseCodes::SparseCodes(const StoredCodes& stored, const uint8_t* kept, ThreadPool& pool) : scales_(stored, pool) {
  if (stored.zero_codes != nullptr) throw std::invalid_argument("sparse codes have no zero points");
  if (stored.stream_bits != 8) throw std::invalid_argument("sparse codes come a byte each");
  scales_.drop_codes();
  const Cut& cut = scales_.view().cut;
  if (cut.block % kChunkColumns != 0)
    throw std::invalid_argument("groups of " + std::to_string(cut.group) + " columns are too narrow for sparse codes; they begin at 17");
  choose_units(stored);
  choose_window(kept, pool);
  const size_t tiles = static_cast<size_t>(view_.exact.tiles), blocks = static_cast<size_t>(cut.blocks());
  starts_.assign(tiles + 1, 0);
  for (size_t tile = 0; tile < tiles; ++tile) {
    starts_[tile + 1] = starts_[tile];
    for (size_t block = 0; block < blocks; ++block) starts_[tile + 1] += counts_[tile * blocks + block];
  }
  entries_ = Storage(static_cast<size_t>(starts_.back()) * view_.step_bytes());
  bases_ = Storage(static_cast<size_t>(starts_.back()));
  view_.counts = counts_.data();
  view_.bases = bases_.data();
  view_.entries = entries_.data();
  view_.starts = starts_.data();
  pool.run(view_.exact.tiles, 4, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) lay_out_tile(stored, kept, static_cast<int>(tile));
  });
}

void SparseCodes::choose_units(const StoredCodes& stored) {
  CodedMatrix& exact = view_.exact = scales_.view();
  const std::vector<float>& levels = stored.levels;
  const auto zero = std::find(levels.begin(), levels.end(), 0.0f);
  if (zero == levels.end()) throw std::invalid_argument("a grid without zero has no sparse codes");
  const int zero_code = static_cast<int>(zero - levels.begin());
  view_.wide = stored.bits > 4;
  if (view_.wide) {  // of equal steps, or Coded had refused
    view_.zero_code = static_cast<uint8_t>(zero_code);
    exact.bits = 8;
    exact.zero = 0;
    for (int i = 0; i < 256; ++i) exact.levels[i] = static_cast<float>(i - 128) * exact.unit_size;
    view_.rounded = exact;
    return;
  }
  exact.bits = 4;
  view_.zero_code = static_cast<uint8_t>(zero_code);
  view_.rounded = exact;
  if (exact.equal_steps) {
    for (size_t code = 0; code < levels.size(); ++code) view_.units[code] = static_cast<int8_t>(static_cast<int>(code) - zero_code);
    return;
  }
  float largest = 0, smallest = 0;
  for (const float level : levels) {
    largest = std::max(largest, std::fabs(level));
    if (level != 0 && (smallest == 0 || std::fabs(level) < smallest)) smallest = std::fabs(level);
  }
  bool whole = largest <= smallest * 127;
  for (const float level : levels) whole = whole && level / smallest == std::nearbyint(level / smallest);
  CodedMatrix& rounded = view_.rounded;
  rounded.bits = 8;
  rounded.equal_steps = true;
  rounded.zero = 0;
  rounded.unit_size = whole ? smallest : largest / 127;
  for (size_t code = 0; code < levels.size(); ++code)
    view_.units[code] = static_cast<int8_t>(std::lround(levels[code] / rounded.unit_size));
}

void SparseCodes::choose_window(const uint8_t* kept, ThreadPool& pool) {
  constexpr double kWideCost = 1.15;  // of a step that looks at 64 columns, over one that looks at 32
  const Cut& cut = view_.exact.cut;
  const size_t blocks = static_cast<size_t>(cut.blocks());
  double best = 0;
  for (const int window : {32, 64}) {
    if (cut.block < window) continue;
    std::vector<uint16_t> counts(blocks * static_cast<size_t>(view_.exact.tiles));
    pool.run(view_.exact.tiles, 4, [&](int64_t first, int64_t last) {
      BlockRows rows;
      for (int64_t tile = first; tile < last; ++tile)
        for (size_t block = 0; block < blocks; ++block) {
          read_block(cut, kept, view_.exact.rows, static_cast<int>(tile), static_cast<int>(block), &rows);
          counts[static_cast<size_t>(tile) * blocks + block] =
              static_cast<uint16_t>(schedule(rows, cut.block, window, [](int) {}, [](int, int, int, int) {}));
        }
    });
    double cost = 0;
    for (const uint16_t count : counts) cost += window == 32 ? count : count * kWideCost;
    if (view_.window != 0 && cost >= best) continue;
    best = cost;
    view_.window = window;
    counts_ = std::move(counts);
  }
}

void SparseCodes::lay_out_tile(const StoredCodes& stored, const uint8_t* kept, int tile) {
  const Cut& cut = view_.exact.cut;
  const int64_t first = starts_[static_cast<size_t>(tile)], steps = starts_[static_cast<size_t>(tile) + 1] - first;
  uint8_t* base = bases_.data() + first;
  uint8_t* step = entries_.data() + first * view_.step_bytes() - view_.step_bytes();
  if (!view_.wide) std::memset(step + view_.step_bytes(), view_.zero_code << 4, static_cast<size_t>(steps) * view_.step_bytes());
  BlockRows rows;
  for (int block = 0; block < cut.blocks(); ++block) {
    read_block(cut, kept, stored.rows, tile, block, &rows);
    const auto begin = [&](int from) {
      *base++ = static_cast<uint8_t>(from);
      step += view_.step_bytes();
    };
    schedule(rows, cut.block, view_.window, begin, [&](int row, int entry, int distance, int column) {
      const int slot = row * kStepEntries + entry;
      const uint8_t* codes = stored.streams + static_cast<size_t>(tile * kTileRows + row) * stored.stream_bytes;
      const int code = column < 0 ? view_.zero_code : codes[column];
      if (view_.wide) {
        step[slot] = static_cast<uint8_t>(code - view_.zero_code);
        step[kStepBytes + slot / 2] |= static_cast<uint8_t>(distance << (slot % 2 * 4));
      } else {
        step[slot] = static_cast<uint8_t>(code << 4 | distance);
      }
    });
  }
}

SparseNumbers::SparseNumbers(const void* values, Number type, int rows, int columns, ThreadPool& pool) {
  if (rows < 1 || columns < 1) throw std::invalid_argument("a weight has at least one row and one column");
  view_.rows = rows;
  view_.columns = columns;
  view_.tiles = (rows + kTileRows - 1) / kTileRows;
  view_.type = type;
  const bool single = type == Number::float32;
  starts_.assign(static_cast<size_t>(view_.tiles) + 1, 0);
  pool.run(view_.tiles, 4, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile)
      starts_[static_cast<size_t>(tile) + 1] =
          single ? count_numbers(static_cast<const float*>(values), rows, columns, static_cast<int>(tile))
                 : count_numbers(static_cast<const uint16_t*>(values), rows, columns, static_cast<int>(tile));
  });
  for (size_t tile = 0; tile < static_cast<size_t>(view_.tiles); ++tile) starts_[tile + 1] += starts_[tile];
  entries_ = Storage(static_cast<size_t>(starts_.back()) * view_.step_bytes());
  view_.entries = entries_.data();
  view_.starts = starts_.data();
  pool.run(view_.tiles, 4, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      uint8_t* to = entries_.data() + starts_[static_cast<size_t>(tile)] * view_.step_bytes();
      if (single) {
        lay_out_numbers(static_cast<const float*>(values), view_, static_cast<int>(tile), to);
      } else {
        lay_out_numbers(static_cast<const uint16_t*>(values), view_, static_cast<int>(tile), to);
      }
    }
  });
}

}  // namespace fettle
