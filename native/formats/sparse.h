// Pruned weights, laid out so that a product reads and multiplies what stayed: plain data, and what owns it.
//
// Codes. Rows come in tiles of 8 as everywhere, columns in blocks that share a scale of the inputs. A tile's block has
// steps; a step looks at a window of 32 or 64 columns from its base on, and holds up to four entries of each row there:
//
//   up to 4 bits   u8 [8 rows][4]                 low nibble: columns since the entry before, high nibble: the code
//   more           u8 [8 rows][4], u8 [8 rows][2] units, signed; then those distances, two a byte
//
// The first distance counts from the base. The next base is the first column that some row has not come to, so rows run
// ahead of each other and few entries stay empty; a gap of more than 15 takes an entry of value zero on the way. A window's
// inputs fit registers, so one byte shuffle for 16 columns fetches what 32 entries multiply: work is in proportion to what
// stayed, which a bit mask does not give.
//
// Values. A step is one entry of each row of a tile: u8 [8] columns since the last entry, then 8 numbers; gaps of more than
// 255 take an entry of zero on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats/coded.h"
#include "formats/matrix.h"
#include "formats/storage.h"

namespace fettle {

constexpr int kStepEntries = 4;   // of a row
constexpr int kFarthest = 15;     // columns from one entry of codes to the next
constexpr int kFarthestValue = 255;

struct SparseMatrix {
  CodedMatrix exact;    // what a dense tile of 4 or 8 bits would be, without its codes: for inputs in float32
  CodedMatrix rounded;  // the same for inputs in bytes; differs where levels are not equally far apart
  bool wide = false;    // units of 8 bits
  int window = 0;       // columns
  uint8_t zero_code = 0;
  int8_t units[16] = {};             // of a code, signed, where not wide
  const uint16_t* counts = nullptr;  // [tiles][blocks]: steps
  const uint8_t* bases = nullptr;    // [steps]: columns of the block before the window
  const uint8_t* entries = nullptr;  // [steps][step_bytes]
  const int64_t* starts = nullptr;   // [tiles + 1] in steps

  int step_bytes() const { return wide ? kStepBytes + kStepBytes / 2 : kStepBytes; }
};

struct SparseValues {
  int rows = 0, tiles = 0, columns = 0;
  Number type = Number::float32;
  const uint8_t* entries = nullptr;
  const int64_t* starts = nullptr;  // [tiles + 1] in steps

  int step_bytes() const { return kTileRows * (1 + number_bytes(type)); }
};

// Owns what a SparseMatrix points to.
class SparseCodes {
 public:
  // kept: [rows][columns], what stayed. Throws std::invalid_argument for zero points, a grid without zero, groups of at
  // most 16 columns, and whatever Coded refuses.
  SparseCodes(const StoredCodes& stored, const uint8_t* kept, ThreadPool& pool);

  const SparseMatrix& view() const { return view_; }
  size_t bytes() const {
    return scales_.bytes() + entries_.size() + bases_.size() + counts_.size() * sizeof(uint16_t) + starts_.size() * sizeof(int64_t);
  }

 private:
  void choose_units(const StoredCodes& stored);
  void choose_window(const uint8_t* kept, ThreadPool& pool);
  void lay_out_tile(const StoredCodes& stored, const uint8_t* kept, int tile);

  Coded scales_;  // without its codes
  SparseMatrix view_;
  Storage entries_, bases_;
  std::vector<uint16_t> counts_;
  std::vector<int64_t> starts_;
};

class SparseNumbers {
 public:
  // values: [rows][columns] of `type`; what is zero went. Throws std::invalid_argument for an empty weight.
  SparseNumbers(const void* values, Number type, int rows, int columns, ThreadPool& pool);

  const SparseValues& view() const { return view_; }
  size_t bytes() const { return entries_.size() + starts_.size() * sizeof(int64_t); }

 private:
  SparseValues view_;
  Storage entries_;
  std::vector<int64_t> starts_;
};

}  // namespace fettle
