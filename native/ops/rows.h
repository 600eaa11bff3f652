// Ops on rows of activations: norms, rotary positions, gates, soft caps. Included once for each instruction set.
#pragma once

#include <cmath>

#include "ops/kernels.h"
#include "ops/vectors.h"

namespace fettle {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
  Floats squares = {};
  int i = 0;
  for (; i + 8 <= size; i += 8) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
  for (i = 0; i + 8 <= size; i += 8) store(out + i, load(x + i) * factor * load(weight + i));
  for (; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int size, float* out) {
  Floats sums = {};
  int i = 0;
  for (; i + 8 <= size; i += 8) sums += load(x + i);
  float total = sum(sums);
  for (; i < size; ++i) total += x[i];
  const float mean = total / static_cast<float>(size);
  Floats squares = {};
  for (i = 0; i + 8 <= size; i += 8) squares += (load(x + i) - mean) * (load(x + i) - mean);
  float spread = sum(squares);
  for (; i < size; ++i) spread += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(spread / static_cast<float>(size) + eps);
  for (i = 0; i + 8 <= size; i += 8) store(out + i, (load(x + i) - mean) * factor * load(weight + i) + load(bias + i));
  for (; i < size; ++i) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

void rotate(float* heads, int count, int64_t head_stride, int size, const float* cosine, const float* sine) {
  const int half = size / 2;
  for (int head = 0; head < count; ++head) {
    float* low = heads + head * head_stride;
    float* high = low + half;
    int i = 0;
    for (; i + 8 <= half; i += 8) {
      const Floats a = load(low + i), b = load(high + i), c = load(cosine + i), s = load(sine + i);
      store(low + i, a * c - b * s);
      store(high + i, b * c + a * s);
    }
    for (; i < half; ++i) {
      const float a = low[i], b = high[i];
      low[i] = a * cosine[i] - b * sine[i];
      high[i] = b * cosine[i] + a * sine[i];
    }
  }
}

// Never inlined, so that the last few of a row, which come here through a register of their own, get the same operations.
__attribute__((noinline)) Floats gated(Gate gate, Floats x) {
  switch (gate) {
    case Gate::silu:
      return x / (1.0f + exponential(-x));
    case Gate::gelu_tanh:
      return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case Gate::gelu_erf: {
      Floats value;
      for (int i = 0; i < 8; ++i) value[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
      return value;
    }
    default:
      return larger(x, Floats{});
  }
}

void activate(Gate gate, float* x, const float* times, int size) {
  int i = 0;
  for (; i + 8 <= size; i += 8) {
    const Floats value = gated(gate, load(x + i));
    store(x + i, times == nullptr ? value : value * load(times + i));
  }
  if (i == size) return;
  float rest[8] = {};
  for (int j = i; j < size; ++j) rest[j - i] = x[j];
  const Floats value = gated(gate, load(rest));
  for (int j = i; j < size; ++j) x[j] = times == nullptr ? value[j - i] : value[j - i] * times[j];
}

__attribute__((noinline)) Floats capped(Floats x, float cap) { return cap * hyperbolic_tangent(x / cap); }

void soft_cap(float* x, float cap, int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) store(x + i, capped(load(x + i), cap));
  if (i == size) return;
  float rest[8] = {};
  for (int64_t j = i; j < size; ++j) rest[j - i] = x[j];
  const Floats value = capped(load(rest), cap);
  for (int64_t j = i; j < size; ++j) x[j] = value[j - i];
}

}  // namespace
}  // namespace fettle
