// From planes back to bytes, and what the groups of a tile share as floats. Included once for each instruction set.
#pragma once

#include "ops/vectors.h"

namespace fettle {
namespace {

inline const uint8_t* chunk_of(const CodedMatrix& weight, int tile, int chunk) {
  return weight.codes + (static_cast<int64_t>(tile) * weight.cut.chunks + chunk) * (kChunkColumns * weight.bits);
}

// One chunk → codes [8 steps][8 rows][4 columns]; the inverse of pack_chunk in formats/coded.cpp. Codes of 8 bits come
// as they are meant, 0 … 255.
inline void unpack_codes(const uint8_t* planes, int bits, uint8_t* codes) {
  if (bits == 8) {
    for (int i = 0; i < kChunkSteps * kStepBytes; ++i) codes[i] = planes[i] ^ 0x80;
    return;
  }
  for (int i = 0; i < kChunkSteps * kStepBytes; ++i) codes[i] = 0;
  int low = 0;
  for (int width = 4; width >= 1; width /= 2) {
    if (!(bits & width)) continue;
    const int steps = 8 / width, mask = (1 << width) - 1;
    for (int first = 0; first < kChunkSteps; first += steps, planes += kStepBytes)
      for (int i = 0; i < steps; ++i)
        for (int lane = 0; lane < kStepBytes; ++lane)
          codes[(first + i) * kStepBytes + lane] |= static_cast<uint8_t>(((planes[lane] >> (i * width)) & mask) << low);
    low += width;
  }
}

inline int64_t group_place(const CodedMatrix& weight, int tile, int group) {
  return (static_cast<int64_t>(tile) * weight.cut.stored_groups() + group) * kTileRows;
}

inline Floats group_scales(const CodedMatrix& weight, int tile, int group) {
  return load_number(weight.scales, weight.scale_type, group_place(weight, tile, group));
}

// Zero points in units, of the 8 rows.
inline Floats group_zeros(const CodedMatrix& weight, int tile, int group) {
  if (weight.zeros == nullptr) return all(weight.zero);
  const uint8_t* codes = weight.zeros + group_place(weight, tile, group);
  Ints units;
  for (int row = 0; row < kTileRows; ++row) units[row] = weight.equal_steps ? codes[row] : weight.units[codes[row] & 15];
  return __builtin_convertvector(units, Floats) - (weight.bits == 8 ? 128.0f : 0.0f);
}

}  // namespace
}  // namespace fettle
