// Codes times bytes with AVX2: maddubs multiplies unsigned units with signed inputs and adds neighbours in 16 bits.
//
//   Σ unit·code of a block, for 8 rows at once          then   sum += scale · scale_of_inputs · (dot - zero · Σ codes)
//
// A step of the weight is one register of 8 rows × 4 columns, the 4 codes of the inputs are repeated in all lanes, so no
// sum crosses lanes. 16 bits hold `flush` such products before they are widened: 8 for units below 16, 1 from 64 on.
// Codes of 8 bits are signed: |code| times the input with the code's sign. Where the zero point is one whole number for
// all, its share -zero · Σ codes is what the 16-bit sums start from, and costs nothing.
//
// Two shapes: a few tokens unpack in registers as they go (decoding: memory is the limit); many tokens unpack a panel of
// 16 rows into the first-level cache once and use it for all (prefill: arithmetic is the limit). Both do the same
// operations in the same order for a token, so their results are the same to the bit.
#pragma once

#include <immintrin.h>

#include "ops/integer_many_avx2.h"
#include "ops/kernels.h"

namespace fettle {
namespace {

constexpr int kFew = 8;  // tokens up to which unpacking again costs less than a panel

template <int BITS, Units UNITS, bool CENTRED>
void integer_matmul(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  if (inputs.tokens <= kFew) {
    if (weight.cut.block < kChunkColumns) return few_tokens<BITS, UNITS, CENTRED, kHalfSteps, false>(weight, inputs, span, out, stride);
    if (weight.cut.padded_group == kChunkColumns)
      return few_tokens<BITS, UNITS, CENTRED, kChunkSteps, true>(weight, inputs, span, out, stride);
    few_tokens<BITS, UNITS, CENTRED, kChunkSteps, false>(weight, inputs, span, out, stride);
  } else {
    many_tokens<BITS, UNITS, CENTRED>(weight, inputs, span, out, stride);
  }
}

using Integer = void (*)(const CodedMatrix&, const QuantizedInputs&, Span, float*, int64_t);

template <int BITS>
inline Integer choose(const CodedMatrix& weight) {
  const bool whole = weight.zero == static_cast<float>(static_cast<int>(weight.zero)) && weight.zero >= 0;
  if (!weight.equal_steps) {
    if constexpr (BITS <= 4) {
      return weight.units[15] <= 32 ? integer_matmul<BITS, Units::narrow, false> : integer_matmul<BITS, Units::wide, false>;
    }
  }
  if constexpr (BITS <= 4) {
    if (weight.zeros == nullptr && whole && weight.zero < 16) return integer_matmul<BITS, Units::equal, true>;
  }
  if constexpr (BITS == 8) {
    if (weight.zeros == nullptr && weight.zero == 0) return integer_matmul<BITS, Units::equal, true>;
  }
  return integer_matmul<BITS, Units::equal, false>;
}

void coded_integer_matmul(const CodedMatrix& weight, const QuantizedInputs& inputs, Span span, float* out, int64_t stride) {
  static const auto find = [](const CodedMatrix& w) -> Integer {
    switch (w.bits) {
      case 1: return choose<1>(w);
      case 2: return choose<2>(w);
      case 3: return choose<3>(w);
      case 4: return choose<4>(w);
      case 5: return choose<5>(w);
      case 6: return choose<6>(w);
      case 7: return choose<7>(w);
      default: return choose<8>(w);
    }
  };
  find(weight)(weight, inputs, span, out, stride);
}

}  // namespace
}  // namespace fettle
