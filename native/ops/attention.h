// Attention over a paged cache, a page at a time with the online softmax (Milakov and Gimelshein 2018,
// https://arxiv.org/abs/1805.02867): memory is linear in the length, and no matrix of scores exists.
//
//   m' = max(m, max_j s_j)    l' = l·e^(m-m') + Σ_j e^(s_j-m')    out' = out·e^(m-m') + Σ_j e^(s_j-m') v_j
//
// Keys of a page lie [head_size][page_size], so that the scores of neighbouring positions are one register and no sum
// crosses it. Each row (a head of a token) does the same sums whatever else is in the call: tokens do not change with
// the batch. Included once for each instruction set.
#pragma once

#include <cmath>

#include "ops/kernels.h"
#include "ops/vectors.h"

namespace fettle {
namespace {

constexpr float kNothing = -3.0e38f;  // the maximum of no scores

inline const float* widen(const void* from, Number type, int64_t first, int64_t count, float* scratch) {
  if (type == Number::float32) return static_cast<const float*>(from) + first;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store(scratch + i, load_number(from, type, first + i));
  const uint16_t* half = static_cast<const uint16_t*>(from) + first;
  for (; i < count; ++i) scratch[i] = type == Number::float16 ? from_float16(half[i]) : from_bfloat16(half[i]);
  return scratch;
}

// scores[j] = Σ_d query[d] · keys[d][j]
inline void score(const float* query, const float* keys, int size, int page, float* scores) {
  int j = 0;
  for (; j + 16 <= page; j += 16) {
    Floats a = {}, b = {};
    for (int d = 0; d < size; ++d) {
      a += query[d] * load(keys + d * page + j);
      b += query[d] * load(keys + d * page + j + 8);
    }
    store(scores + j, a);
    store(scores + j + 8, b);
  }
  for (; j < page; ++j) {
    float total = 0;
    for (int d = 0; d < size; ++d) total += query[d] * keys[d * page + j];
    scores[j] = total;
  }
}

// out = out · keep + Σ_j weights[j] · values[j], j from first to last-1
inline void accumulate(float* out, float keep, const float* weights, const float* values, int first, int last, int size) {
  int d = 0;
  for (; d + 32 <= size; d += 32) {
    Floats a = load(out + d) * keep, b = load(out + d + 8) * keep;
    Floats e = load(out + d + 16) * keep, f = load(out + d + 24) * keep;
    for (int j = first; j < last; ++j) {
      const float* row = values + j * size + d;
      a += weights[j] * load(row);
      b += weights[j] * load(row + 8);
      e += weights[j] * load(row + 16);
      f += weights[j] * load(row + 24);
    }
    store(out + d, a);
    store(out + d + 8, b);
    store(out + d + 16, e);
    store(out + d + 24, f);
  }
  for (; d < size; ++d) {
    float total = out[d] * keep;
    for (int j = first; j < last; ++j) total += weights[j] * values[j * size + d];
    out[d] = total;
  }
}

// Scores of positions first … last-1 of a page into the running softmax of one row.
inline void absorb(float* scores, int first, int last, const AttentionQueries& q, float* state, const float* values,
                   int size, float* out) {
  float top = kNothing;
  for (int j = first; j < last; ++j) {
    float s = scores[j] * q.scale;
    if (q.soft_cap != 0) s = q.soft_cap * std::tanh(s / q.soft_cap);
    scores[j] = s;
    top = s > top ? s : top;
  }
  const float maximum = top > state[0] ? top : state[0];
  const float keep = exponential(all(state[0] - maximum))[0];
  float total = 0;
  for (int j = first; j < last; j += 8) {
    const int count = last - j < 8 ? last - j : 8;
    float part[8];
    for (int i = 0; i < 8; ++i) part[i] = i < count ? scores[j + i] - maximum : -1000.0f;
    const Floats power = exponential(load(part));
    for (int i = 0; i < count; ++i) scores[j + i] = power[i];
    total += sum(power);
  }
  state[0] = maximum;
  state[1] = state[1] * keep + total;
  accumulate(out, keep, scores, values, first, last, size);
}

void attend(const CacheLayer& cache, const AttentionQueries& q, float* scratch) {
  const int size = cache.head_size, page = cache.page_size, rows = q.tokens * q.heads;
  const int64_t slab = static_cast<int64_t>(size) * page;
  float* wide_keys = scratch;
  float* wide_values = wide_keys + slab;
  float* scores = wide_values + slab;
  float* states = scores + static_cast<int64_t>(rows) * page;
  for (int row = 0; row < rows; ++row) {
    states[2 * row] = kNothing;
    states[2 * row + 1] = 0;
    float* out = q.out + (row / q.heads) * q.token_stride + (row % q.heads) * size;
    for (int d = 0; d < size; ++d) out[d] = 0;
  }
  const int oldest = q.window > 0 && q.position + 1 > q.window ? q.position + 1 - q.window : 0;
  const int newest = q.position + q.tokens - 1;
  for (int number = oldest / page; number <= newest / page; ++number) {
    const int64_t first = (static_cast<int64_t>(q.pages[number]) * cache.kv_heads + q.kv_head) * slab;
    const float* keys = widen(cache.keys, cache.type, first, slab, wide_keys);
    const float* values = widen(cache.values, cache.type, first, slab, wide_values);
    for (int row = 0; row < rows; ++row) {
      const int token = row / q.heads, position = q.position + token, start = number * page;
      const int seen = position + 1 - start < page ? position + 1 - start : page;
      const int lost = q.window > 0 && position + 1 - q.window > start ? position + 1 - q.window - start : 0;
      if (lost >= seen) continue;
      const int64_t at = token * q.token_stride + static_cast<int64_t>(row % q.heads) * size;
      score(q.queries + at, keys, size, page, scores);
      absorb(scores, lost, seen, q, states + 2 * row, values, size, q.out + at);
    }
  }
  for (int row = 0; row < rows; ++row) {
    float* out = q.out + (row / q.heads) * q.token_stride + (row % q.heads) * size;
    const float share = 1.0f / states[2 * row + 1];
    for (int d = 0; d < size; ++d) out[d] *= share;
  }
}

void store_keys_values(const CacheLayer& cache, int page, int slot, const float* keys, const float* values) {
  const int size = cache.head_size, length = cache.page_size;
  for (int head = 0; head < cache.kv_heads; ++head) {
    const int64_t slab = (static_cast<int64_t>(page) * cache.kv_heads + head) * size * length;
    for (int d = 0; d < size; ++d) {
      const float key = keys[head * size + d], value = values[head * size + d];
      const int64_t key_at = slab + static_cast<int64_t>(d) * length + slot;
      const int64_t value_at = slab + static_cast<int64_t>(slot) * size + d;
      if (cache.type == Number::float32) {
        static_cast<float*>(cache.keys)[key_at] = key;
        static_cast<float*>(cache.values)[value_at] = value;
      } else {
        static_cast<uint16_t*>(cache.keys)[key_at] = to_float16(key);
        static_cast<uint16_t*>(cache.values)[value_at] = to_float16(value);
      }
    }
  }
}

}  // namespace
}  // namespace fettle
