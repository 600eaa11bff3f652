#include "ops/round_inputs.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fettle {
namespace {

constexpr float kLargestE4m3 = 448;

// To the nearest whole number, ties to even; below 2^22 in size. This file is compiled without fused multiply-adds.
inline float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

// To the nearest float8_e4m3fn: three bits behind the first one, none below 2^-9.
inline float nearest_e4m3(float x) {
  int exponent = 0;
  std::frexp(x, &exponent);  // x = m · 2^exponent, m from 0.5 to below 1
  const float step = std::ldexp(1.0f, std::max(exponent - 1, -6) - 3);
  return whole(x / step) * step;
}

}  // namespace

void round_inputs(const InputRounding& rounding, const float* x, int size, float* out) {
  float low = 0, high = 0;
  for (int i = 0; i < size; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  const bool floats = rounding.kind == InputRounding::Kind::e4m3, shifted = rounding.kind == InputRounding::Kind::asymmetric;
  const float top = static_cast<float>((1 << (rounding.bits - 1)) - 1), bottom = -top - 1;
  float scale = rounding.scale, point = rounding.point;
  if (scale == 0) {
    const float reach = std::max(-low, high);
    scale = shifted ? (high - low) / (top - bottom) : reach / (floats ? kLargestE4m3 : (top - bottom) / 2);
    point = shifted && scale > 0 ? whole(std::min(std::max(bottom - low / scale, bottom), top)) : 0;
    if (scale == 0) scale = std::numeric_limits<float>::epsilon();
  }
  if (floats) {
    for (int i = 0; i < size; ++i)
      out[i] = nearest_e4m3(std::min(std::max(x[i] / scale, -kLargestE4m3), kLargestE4m3)) * scale;
    return;
  }
  for (int i = 0; i < size; ++i)
    out[i] = (whole(std::min(std::max(x[i] / scale + point, bottom), top)) - point) * scale;
}

}  // namespace fettle
