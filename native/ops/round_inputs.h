// Inputs as a checkpoint quantizes them (W8A8 and the like), rounded as the torch reference rounds them:
//
//   integers   code = round(clamp(x / scale + point)), value = (code - point) · scale
//   e4m3       code = nearest float8_e4m3fn of clamp(x / scale), value = code · scale
//
// with a stored scale, or one a token from its range; fettle/tensors/activations.py has the formulas. Products read the
// values in float32: a symmetric range has the code -128, which a product of signed bytes cannot negate.
#pragma once

#include <cstdint>

namespace fettle {

struct InputRounding {
  enum class Kind : int { none, symmetric, asymmetric, e4m3 };
  Kind kind = Kind::none;
  int bits = 8;
  float scale = 0;  // stored; 0: of each token
  float point = 0;  // stored, of an asymmetric range

  bool operator==(const InputRounding& other) const {
    return kind == other.kind && bits == other.bits && scale == other.scale && point == other.point;
  }
};

// One token's inputs [size] → the values of their codes; out may be x.
void round_inputs(const InputRounding& rounding, const float* x, int size, float* out);

}  // namespace fettle
