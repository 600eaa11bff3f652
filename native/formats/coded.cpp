#include "formats/coded.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "formats/half.h"

namespace fettle {
namespace {

constexpr int kLargestBlock = 128;  // columns that share a scale of the inputs, at most
constexpr int kHalfChunk = kChunkColumns / 2;
constexpr int kLargestUnit = 127;   // times 127 times 2 still fits 16 bits

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// The bits of eight neighbouring codes → a byte each: fields of 4·b, 2·b and b bits move apart, all at once.
template <int BITS>
inline uint64_t spread_eight(uint64_t dense) {
  constexpr uint64_t kFour = (uint64_t{1} << (4 * BITS)) - 1, kTwo = (uint64_t{1} << (2 * BITS)) - 1, kOne = (1u << BITS) - 1;
  constexpr uint64_t kTwos = kTwo | kTwo << 32, kOnes = kOne | kOne << 16 | kOne << 32 | kOne << 48;
  dense = (dense & kFour) | ((dense & (kFour << (4 * BITS))) << (32 - 4 * BITS));
  dense = (dense & kTwos) | ((dense & (kTwos << (2 * BITS))) << (16 - 2 * BITS));
  return (dense & kOnes) | ((dense & (kOnes << BITS)) << (8 - BITS));
}

// A row of codes, a byte each; `codes` has room for a multiple of eight.
template <int BITS>
void read_row(const uint8_t* stream, size_t stream_bytes, int count, uint8_t* codes) {
  size_t at = 0;
  for (int i = 0; i < count; i += 8, at += BITS) {
    uint64_t dense = 0;
    if (at + 8 <= stream_bytes) {
      std::memcpy(&dense, stream + at, 8);
    } else {
      std::memcpy(&dense, stream + at, std::min<size_t>(stream_bytes - at, BITS));
    }
    const uint64_t spread = spread_eight<BITS>(dense);
    std::memcpy(codes + i, &spread, sizeof spread);
  }
  for (int i = count; i % 8 != 0; ++i) codes[i] = 0;
}

template <>
void read_row<8>(const uint8_t* stream, size_t, int count, uint8_t* codes) {
  std::memcpy(codes, stream, static_cast<size_t>(count));
}

// The planes of WIDTH bits of a chunk, those above the `low` lowest; words [steps][rows] of four codes.
template <int WIDTH>
uint8_t* pack_planes(const uint32_t words[kChunkSteps][kTileRows], int low, uint8_t* out) {
  constexpr int kSteps = 8 / WIDTH;  // that one register holds
  constexpr uint32_t kMask = ((1u << WIDTH) - 1u) * 0x01010101u;
  for (int first = 0; first < kChunkSteps; first += kSteps, out += kStepBytes) {
    uint32_t plane[kTileRows] = {};
    for (int i = 0; i < kSteps; ++i)
      for (int row = 0; row < kTileRows; ++row) plane[row] |= ((words[first + i][row] >> low) & kMask) << (i * WIDTH);
    std::memcpy(out, plane, sizeof plane);
  }
  return out;
}

// One chunk of a tile: rows of codes, `stride` apart → planes; see matrix.h.
void pack_chunk(const uint8_t* codes, size_t stride, int bits, uint8_t* out) {
  uint32_t words[kChunkSteps][kTileRows];
  for (int row = 0; row < kTileRows; ++row)
    for (int step = 0; step < kChunkSteps; ++step)
      std::memcpy(&words[step][row], codes + row * stride + step * kStepColumns, sizeof(uint32_t));
  if (bits == 8) {
    for (int step = 0; step < kChunkSteps; ++step)
      for (int row = 0; row < kTileRows; ++row) words[step][row] ^= 0x80808080u;
    std::memcpy(out, words, sizeof words);
    return;
  }
  if (bits & 4) out = pack_planes<4>(words, 0, out);
  if (bits & 2) out = pack_planes<2>(words, bits & 4, out);
  if (bits & 1) pack_planes<1>(words, bits & 6, out);
}

using FourWords = uint32_t __attribute__((vector_size(16)));

// Bytes 0 and 1 of each word, in the bytes 0 and 2.
inline FourWords part_bytes(FourWords words) {
  words &= 0xffffu;
  return (words | words << 8) & 0x00ff00ffu;
}

// A tile of rows of 4-bit codes, whole chunks: a row's 16 bytes of a chunk are a word of each of its four registers, whose
// codes 0 … 7 only change places: 0 to 3 become the low nibbles, 4 to 7 the high ones.
void pack_nibbles(const uint8_t* const* rows, int chunks, uint8_t* out) {
  constexpr int kWords = 4;
  for (int chunk = 0; chunk < chunks; ++chunk, out += kWords * kStepBytes) {
    uint32_t words[kTileRows][kWords];
    for (int row = 0; row < kTileRows; ++row) {
      FourWords pairs;
      std::memcpy(&pairs, rows[row] + chunk * sizeof pairs, sizeof pairs);
      const FourWords even = pairs & 0x0f0f0f0fu, odd = pairs >> 4 & 0x0f0f0f0fu;
      const FourWords first = part_bytes(even) | part_bytes(odd) << 8;
      const FourWords last = part_bytes(even >> 16) | part_bytes(odd >> 16) << 8;
      const FourWords packed = first | last << 4;
      std::memcpy(words[row], &packed, sizeof packed);
    }
    uint32_t turned[kWords][kTileRows];
    for (int row = 0; row < kTileRows; ++row)
      for (int word = 0; word < kWords; ++word) turned[word][row] = words[row][word];
    std::memcpy(out, turned, sizeof turned);
  }
}

using ReadRow = void (*)(const uint8_t* stream, size_t stream_bytes, int count, uint8_t* codes);
constexpr ReadRow kReadRow[] = {nullptr, read_row<1>, read_row<2>, read_row<3>, read_row<4>, read_row<5>, read_row<6>, read_row<7>, read_row<8>};

// The step between neighbouring levels where it is the same everywhere, exactly; 0 otherwise.
float equal_step(const std::vector<float>& levels) {
  const float step = levels[1] - levels[0];
  for (size_t i = 0; i < levels.size(); ++i)
    if (levels[0] + step * static_cast<float>(i) != levels[i]) return 0;
  return step;
}

}  // namespace

Cut make_cut(int columns, int group) {
  Cut cut;
  cut.columns = columns;
  cut.group = std::min(group, columns);
  cut.padded_group = cut.group <= kHalfChunk ? kHalfChunk : round_up(cut.group, kChunkColumns);
  cut.groups = (columns + cut.group - 1) / cut.group;
  if (cut.groups == 1) cut.padded_group = round_up(cut.padded_group, kChunkColumns);
  // The last group may be short; rows of whole groups keep every block inside one group.
  cut.chunks = round_up(cut.groups * cut.padded_group, kChunkColumns) / kChunkColumns;
  const int chunks = cut.padded_group / kChunkColumns;  // of a group; 0 for a half
  cut.block = cut.padded_group;
  for (int size = kLargestBlock / kChunkColumns; chunks > 0 && size >= 1; --size) {
    if (chunks % size != 0) continue;
    cut.block = size * kChunkColumns;
    break;
  }
  return cut;
}

bool has_units(const std::vector<float>& levels, int bits) { return bits <= 4 || equal_step(levels) != 0; }

Coded::Coded(const StoredCodes& stored, ThreadPool& pool) {
  const auto refuse = [](const std::string& why) { throw std::invalid_argument(why); };
  if (stored.rows < 1 || stored.columns < 1 || stored.group < 1) refuse("a weight has at least one row, column and group");
  if (stored.bits < 1 || stored.bits > 8) refuse("codes have 1 to 8 bits, not " + std::to_string(stored.bits));
  if (stored.stream_bits != stored.bits && stored.stream_bits != 8) refuse("a code takes its own bits in a row, or 8");
  if (stored.levels.size() < 2 || stored.levels.size() > (size_t{1} << stored.bits))
    refuse(std::to_string(stored.levels.size()) + " levels do not fit " + std::to_string(stored.bits) + " bits");
  if (stored.stream_bytes * 8 < static_cast<size_t>(stored.columns) * static_cast<size_t>(stored.stream_bits))
    refuse("a row of codes is too short for its columns");
  if (stored.scale_rows != stored.rows && stored.scale_rows != 1) refuse("scales are one a row, or one for all rows");

  view_.rows = stored.rows;
  view_.tiles = (stored.rows + kTileRows - 1) / kTileRows;
  view_.bits = stored.bits;
  view_.cut = make_cut(stored.columns, stored.group);
  view_.scale_type = view_.rounding = stored.scale_type;
  view_.gain = stored.gain;
  choose_units(stored.levels);

  // A half chunk may follow the last group: blocks there read a scale of zero.
  const size_t shared = static_cast<size_t>(view_.tiles) * static_cast<size_t>(view_.cut.stored_groups()) * kTileRows;
  codes_ = Storage(static_cast<size_t>(view_.tiles) * view_.cut.chunks * kChunkColumns * stored.bits);
  scales_ = Storage(shared * number_bytes(stored.scale_type));
  view_.codes = codes_.data();
  view_.scales = scales_.data();
  if (stored.zero_codes != nullptr) {
    zeros_ = Storage(shared);
    view_.zeros = zeros_.data();
  }
  std::atomic<int> largest{0};
  pool.run(view_.tiles, 4, [&](int64_t first, int64_t last) {
    int found = 0;
    for (int64_t tile = first; tile < last; ++tile) found = std::max(found, lay_out_tile(stored, static_cast<int>(tile)));
    for (int known = largest.load(); known < found && !largest.compare_exchange_weak(known, found);) continue;
  });
  if (largest.load() >= static_cast<int>(stored.levels.size()))
    refuse("a code is " + std::to_string(largest.load()) + ", and there are " + std::to_string(stored.levels.size()) + " levels");
}

void Coded::choose_units(const std::vector<float>& levels) {
  const size_t count = levels.size();
  for (size_t code = 0; code < 256; ++code) view_.levels[code] = levels[std::min(code, count - 1)];
  const float step = equal_step(levels);
  view_.equal_steps = step != 0;
  if (view_.equal_steps) {
    view_.unit_size = step;
    view_.zero = -levels[0] / step - (view_.bits == 8 ? 128.0f : 0.0f);
    return;
  }
  if (view_.bits > 4) throw std::invalid_argument("more than 16 levels that are not equally far apart have no kernel");
  const float span = levels[count - 1] - levels[0];
  float smallest = span;
  for (size_t i = 1; i < count; ++i) smallest = std::min(smallest, levels[i] - levels[i - 1]);
  // The smallest gap is the unit where all levels are multiples of it, such as those of e2m1; else 127 units span all.
  bool whole = span <= smallest * kLargestUnit;
  for (size_t i = 0; whole && i < count; ++i) {
    const float units = (levels[i] - levels[0]) / smallest;
    whole = units == std::nearbyint(units);
  }
  view_.unit_size = whole ? smallest : span / kLargestUnit;
  view_.zero = -levels[0] / view_.unit_size;
  for (size_t code = 0; code < 16; ++code)
    view_.units[code] = static_cast<uint8_t>(std::lround((view_.levels[code] - levels[0]) / view_.unit_size));
}

void Coded::lay_out_shared(const StoredCodes& stored, int tile) {
  const Cut& cut = view_.cut;
  const size_t number = static_cast<size_t>(number_bytes(stored.scale_type));
  for (int row = 0; row < kTileRows && tile * kTileRows + row < stored.rows; ++row) {
    const size_t from = stored.scale_rows == 1 ? 0 : static_cast<size_t>(tile * kTileRows + row) * cut.groups;
    const size_t to = static_cast<size_t>(tile) * cut.stored_groups() * kTileRows + row;
    for (int group = 0; group < cut.groups; ++group) {
      const uint8_t* scale = static_cast<const uint8_t*>(stored.scales) + (from + group) * number;
      uint8_t* place = scales_.data() + (to + static_cast<size_t>(group) * kTileRows) * number;
      if (number == 2) {
        std::memcpy(place, scale, 2);
      } else {
        std::memcpy(place, scale, 4);
      }
      if (stored.zero_codes != nullptr) zeros_.data()[to + static_cast<size_t>(group) * kTileRows] = stored.zero_codes[from + group];
    }
  }
}

int Coded::lay_out_tile(const StoredCodes& stored, int tile) {
  lay_out_shared(stored, tile);
  const Cut& cut = view_.cut;
  const size_t padded = static_cast<size_t>(cut.padded()), chunk_bytes = static_cast<size_t>(kChunkColumns) * stored.bits;
  const bool limited = stored.levels.size() < (size_t{1} << stored.bits);  // or every code has a level
  const bool as_stored = cut.groups == 1 || cut.group == cut.padded_group;
  uint8_t* out = codes_.data() + static_cast<size_t>(tile) * cut.chunks * chunk_bytes;
  if (stored.stream_bits == 4 && as_stored && !limited && cut.columns == cut.padded() && (tile + 1) * kTileRows <= stored.rows) {
    const uint8_t* rows[kTileRows];
    for (int row = 0; row < kTileRows; ++row) rows[row] = stored.streams + static_cast<size_t>(tile * kTileRows + row) * stored.stream_bytes;
    pack_nibbles(rows, cut.chunks, out);
    return 0;
  }
  std::vector<uint8_t> codes(kTileRows * padded), apart(padded);
  int largest = 0;
  for (int row = 0; row < kTileRows; ++row) {
    const int source = tile * kTileRows + row;
    if (source >= stored.rows) continue;
    uint8_t* own = codes.data() + static_cast<size_t>(row) * padded;
    uint8_t* read = as_stored ? own : apart.data();
    const uint8_t* stream = stored.streams + static_cast<size_t>(source) * stored.stream_bytes;
    kReadRow[stored.stream_bits](stream, stored.stream_bytes, cut.columns, read);
    if (limited)
      for (int i = 0; i < cut.columns; ++i) largest = std::max<int>(largest, read[i]);
    for (int first = 0; first < cut.columns && !as_stored; first += cut.group)
      std::memcpy(own + static_cast<size_t>(first / cut.group) * cut.padded_group, read + first, static_cast<size_t>(std::min(cut.group, cut.columns - first)));
  }
  for (int c = 0; c < cut.chunks; ++c) pack_chunk(codes.data() + c * kChunkColumns, padded, stored.bits, out + c * chunk_bytes);
  return largest;
}

}  // namespace fettle
