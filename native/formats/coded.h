// Codes, laid out for the kernels: owns what a CodedMatrix points to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/threads.h"
#include "formats/matrix.h"
#include "formats/storage.h"

namespace fettle {

// A weight as it comes: rows of codes, dense little-endian or a byte each, and what the codes of a group share.
struct StoredCodes {
  int rows = 0, columns = 0, bits = 0, group = 0;
  int stream_bits = 0;               // bits that a code takes in a stream: `bits`, or 8
  const uint8_t* streams = nullptr;  // [rows][stream_bytes]: code i is the bits i·b … i·b + b - 1
  size_t stream_bytes = 0;
  const void* scales = nullptr;  // [scale_rows][groups] of scale_type; scale_rows is rows, or 1 for the whole weight
  int scale_rows = 0;
  Number scale_type = Number::float32;
  const uint8_t* zero_codes = nullptr;  // as scales, or null
  std::vector<float> levels;            // at most 2^bits, ascending
  float gain = 1;
};

class Coded {
 public:
  // Throws std::invalid_argument where the numbers cannot be: sizes, bits, more levels than codes, a code without a level.
  Coded(const StoredCodes& stored, ThreadPool& pool);

  const CodedMatrix& view() const { return view_; }
  void drop_codes() { codes_ = Storage(), view_.codes = nullptr; }  // keeps what groups share
  size_t bytes() const { return codes_.size() + scales_.size() + zeros_.size(); }

 private:
  void choose_units(const std::vector<float>& levels);
  void lay_out_shared(const StoredCodes& stored, int tile);
  int lay_out_tile(const StoredCodes& stored, int tile);  // the largest code, where not every code has a level

  CodedMatrix view_;
  Storage codes_, scales_, zeros_;
};

// How `columns` columns in groups of `group` are cut.
Cut make_cut(int columns, int group);

// Whether kernels on integer inputs can multiply this: equal steps, or at most 16 levels.
bool has_units(const std::vector<float>& levels, int bits);

}  // namespace fettle
