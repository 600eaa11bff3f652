// What a kernel sees of a weight [rows, columns]: plain data, no ownership.
//
// Rows come in tiles of 8, so that a 256-bit register of 32-bit numbers holds one number of each row and no sum ever
// crosses a register. Codes come in steps of 4 columns (what one multiply-add of bytes sums up) and chunks of 8 steps:
//
//   u8 step [8 rows][4 columns]      byte 4·row + column: one 256-bit register
//   chunk   8 steps, 32 columns      cut into planes of bits: 8, or 4 | 2 | 1, the lowest bits in the widest plane
//
//   4-bit plane: 4 registers   register h holds step 2h in its low nibbles and step 2h+1 in its high ones
//   2-bit plane: 2 registers   register q holds steps 4q … 4q+3 in bit pairs 0 … 3
//   1-bit plane: 1 register    bit i holds step i
//
// so b bits a weight are 32·b bytes a chunk of 256 weights, and unpacking is masks and shifts of whole registers. Codes
// of 8 bits lie as code - 128, signed.
#pragma once

#include <cstdint>

namespace fettle {

constexpr int kTileRows = 8;
constexpr int kStepColumns = 4;
constexpr int kChunkSteps = 8;
constexpr int kChunkColumns = kStepColumns * kChunkSteps;
constexpr int kStepBytes = kTileRows * kStepColumns;

enum class Number : int { float32, float16, bfloat16, int8 };  // int8: in the cache alone

inline constexpr int number_bytes(Number type) {
  return type == Number::float32 ? 4 : type == Number::int8 ? 1 : 2;
}

// How the columns of a coded matrix are cut. Inputs are quantized to fit it; matrices with equal cuts share them.
//
// Each group of `group` columns is padded to `padded_group`, a multiple of 16, and the row as a whole to whole chunks, so
// any group size works; `block` columns share one scale of the inputs: a group, or an equal part of at most 128 of it.
struct Cut {
  int columns = 0;
  int group = 0;
  int padded_group = 0;
  int groups = 0;
  int block = 0;
  int chunks = 0;

  int padded() const { return chunks * kChunkColumns; }
  int blocks() const { return padded() / block; }
  int stored_groups() const { return padded() / padded_group; }  // one more than groups where half a chunk is left over
  bool operator==(const Cut& other) const {
    return columns == other.columns && group == other.group && padded_group == other.padded_group &&
           block == other.block;
  }
};

// value[row][column] = gain · round(scale[row][group] · (levels[code] - level of the zero point))
//
// Kernels on integer inputs multiply units: levels[code] ≈ unit_size · (unit - zero), exactly where levels are equally far
// apart. Then a code is its unit; otherwise 16 units of at most 7 bits are looked up in a register.
struct CodedMatrix {
  int rows = 0;
  int tiles = 0;
  int bits = 0;
  Cut cut;
  const uint8_t* codes = nullptr;  // [tiles][chunks][32·bits]
  const void* scales = nullptr;    // [tiles][cut.stored_groups()][8] of scale_type
  const uint8_t* zeros = nullptr;  // codes [tiles][cut.stored_groups()][8]; null: zero has `zero` units everywhere
  Number scale_type = Number::float32;
  Number rounding = Number::float32;  // the type that a value is rounded to, as compressed-tensors does it
  float levels[256] = {};
  float gain = 1;
  bool equal_steps = true;
  float zero = 0;          // in units
  float unit_size = 1;
  uint8_t units[16] = {};  // of a code, where steps are not equal
};

// Values as they are: [tiles][columns][8] of `type`.
struct DenseMatrix {
  int rows = 0;
  int tiles = 0;
  int columns = 0;
  Number type = Number::float32;
  const void* values = nullptr;
};

// Inputs [tokens, columns] quantized for a cut: code = round(x / scale), scale = max|x| / 127 of a block.
struct QuantizedInputs {
  int tokens = 0;
  const int8_t* codes = nullptr;   // [tokens][padded]
  const float* scales = nullptr;   // [tokens][blocks]
  const float* sums = nullptr;     // [tokens][blocks]: scale · Σ codes
  const int32_t* pairs = nullptr;  // [tokens][2·chunks], a half chunk each: two sums of 16 bits, of the columns 0 and 1 of
                                   // all its steps and of the columns 2 and 3
};

}  // namespace fettle
