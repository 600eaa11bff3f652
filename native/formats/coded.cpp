#include "formats/coded.h"

#include <algorithm>
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

// Codes `first` … of a stream, `count` of them.
void read_codes(const uint8_t* stream, size_t stream_bytes, int bits, int64_t first, int count, uint8_t* codes) {
  if (bits == 8) {
    std::memcpy(codes, stream + first, static_cast<size_t>(count));
    return;
  }
  const unsigned mask = (1u << bits) - 1u;
  for (int i = 0; i < count; ++i) {
    const int64_t bit = (first + i) * bits;
    const size_t byte = static_cast<size_t>(bit >> 3);
    unsigned two = stream[byte];
    if (byte + 1 < stream_bytes) two |= static_cast<unsigned>(stream[byte + 1]) << 8;
    codes[i] = static_cast<uint8_t>((two >> (bit & 7)) & mask);
  }
}

// One chunk of a tile: codes [8 rows][32 columns] → planes; see matrix.h.
void pack_chunk(const uint8_t codes[kTileRows][kChunkColumns], int bits, uint8_t* out) {
  const auto code = [&](int step, int lane) { return codes[lane / kStepColumns][step * kStepColumns + lane % kStepColumns]; };
  if (bits == 8) {
    for (int step = 0; step < kChunkSteps; ++step)
      for (int lane = 0; lane < kStepBytes; ++lane) *out++ = static_cast<uint8_t>(code(step, lane) ^ 0x80);
    return;
  }
  int low = 0;  // bits of a code that earlier planes hold
  for (int width = 4; width >= 1; width /= 2) {
    if (!(bits & width)) continue;
    const int steps = 8 / width, mask = (1 << width) - 1;  // steps that one register holds
    for (int first = 0; first < kChunkSteps; first += steps) {
      for (int lane = 0; lane < kStepBytes; ++lane) {
        unsigned byte = 0;
        for (int i = 0; i < steps; ++i)
          byte |= static_cast<unsigned>((code(first + i, lane) >> low) & mask) << (i * width);
        *out++ = static_cast<uint8_t>(byte);
      }
    }
    low += width;
  }
}

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
  pool.run(view_.tiles, 4, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) lay_out_tile(stored, static_cast<int>(tile));
  });
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

void Coded::lay_out_tile(const StoredCodes& stored, int tile) {
  const Cut& cut = view_.cut;
  const size_t number = static_cast<size_t>(number_bytes(stored.scale_type));
  const size_t chunk_bytes = static_cast<size_t>(kChunkColumns) * stored.bits;
  std::vector<uint8_t> padded(static_cast<size_t>(kTileRows) * cut.padded());
  for (int row = 0; row < kTileRows; ++row) {
    const int source = tile * kTileRows + row;
    if (source >= stored.rows) continue;
    const int shared_row = stored.scale_rows == 1 ? 0 : source;
    for (int group = 0; group < cut.groups; ++group) {
      const int first = group * cut.group, count = std::min(cut.group, cut.columns - first);
      read_codes(stored.streams + static_cast<size_t>(source) * stored.stream_bytes, stored.stream_bytes, stored.stream_bits, first,
                 count, padded.data() + static_cast<size_t>(row) * cut.padded() + group * cut.padded_group);
      const size_t from = static_cast<size_t>(shared_row) * cut.groups + group;
      const size_t to = (static_cast<size_t>(tile) * cut.stored_groups() + group) * kTileRows + row;
      std::memcpy(scales_.data() + to * number, static_cast<const uint8_t*>(stored.scales) + from * number, number);
      if (stored.zero_codes != nullptr) zeros_.data()[to] = stored.zero_codes[from];
    }
  }
  uint8_t* out = codes_.data() + static_cast<size_t>(tile) * cut.chunks * chunk_bytes;
  uint8_t chunk[kTileRows][kChunkColumns];
  for (int c = 0; c < cut.chunks; ++c) {
    for (int row = 0; row < kTileRows; ++row)
      std::memcpy(chunk[row], padded.data() + static_cast<size_t>(row) * cut.padded() + c * kChunkColumns, kChunkColumns);
    pack_chunk(chunk, stored.bits, out + c * chunk_bytes);
  }
}

}  // namespace fettle
