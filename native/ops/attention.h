// Attention over a paged cache, a few pages at a time with the online softmax (Milakov and Gimelshein 2018,
// https://arxiv.org/abs/1805.02867): memory is linear in the length, and no matrix of scores exists.
//
//   m' = max(m, max_j s_j)    l' = l·e^(m-m') + Σ_j e^(s_j-m')    out' = out·e^(m-m') + Σ_j e^(s_j-m') v_j
//
// Keys of a page lie [head_size][page_size], so that the scores of neighbouring positions are one register and no sum
// crosses it. Pages go in spans, whose places in the text are always the same, so that the largest score, the sum and the
// change of scale come once for some dozens of positions. Each row (a head of a token) does the same sums whatever else
// is in the call: tokens do not change with the batch. Included once for each instruction set.
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

// Codes of a slab → values; a scale belongs to a position, which is a column of keys and a row of values.
inline const float* widen_keys(const CacheLayer& cache, int64_t slab_number, float* scratch) {
  const int64_t slab = static_cast<int64_t>(cache.head_size) * cache.page_size, first = slab_number * slab;
  if (cache.type != Number::int8) return widen(cache.keys, cache.type, first, slab, scratch);
  const int8_t* codes = static_cast<const int8_t*>(cache.keys) + first;
  const float* scales = cache.key_scales + slab_number * cache.page_size;
  for (int d = 0; d < cache.head_size; ++d)
    for (int j = 0; j < cache.page_size; ++j)
      scratch[d * cache.page_size + j] = static_cast<float>(codes[d * cache.page_size + j]) * scales[j];
  return scratch;
}

inline const float* widen_values(const CacheLayer& cache, int64_t slab_number, float* scratch) {
  const int64_t slab = static_cast<int64_t>(cache.head_size) * cache.page_size, first = slab_number * slab;
  if (cache.type != Number::int8) return widen(cache.values, cache.type, first, slab, scratch);
  const int8_t* codes = static_cast<const int8_t*>(cache.values) + first;
  const float* scales = cache.value_scales + slab_number * cache.page_size;
  for (int j = 0; j < cache.page_size; ++j)
    for (int d = 0; d < cache.head_size; ++d)
      scratch[j * cache.head_size + d] = static_cast<float>(codes[j * cache.head_size + d]) * scales[j];
  return scratch;
}

// One score. Never inlined: in a loop over rows the compiler fuses other products and sums than in a loop of its own, and
// a row's score must not depend on how many rows there are.
__attribute__((noinline)) float score_alone(const float* query, const float* keys, int size, int page) {
  float total = 0;
  for (int d = 0; d < size; ++d) total += query[d] * keys[d * page];
  return total;
}

// scores[r][j] = Σ_d queries[r][d] · keys[d][j], for R rows that read the keys together
template <int R>
inline void score(const float* const* queries, const float* keys, int size, int page, float* scores, int64_t stride) {
  int j = 0;
  for (; j + 16 <= page; j += 16) {
    Floats low[R], high[R];
    for (int r = 0; r < R; ++r) low[r] = high[r] = Floats{};
    for (int d = 0; d < size; ++d) {
      const Floats a = load(keys + d * page + j), b = load(keys + d * page + j + 8);
      for (int r = 0; r < R; ++r) {
        const Floats q = all(queries[r][d]);
        low[r] += q * a;
        high[r] += q * b;
      }
    }
    for (int r = 0; r < R; ++r) {
      store(scores + r * stride + j, low[r]);
      store(scores + r * stride + j + 8, high[r]);
    }
  }
  for (; j < page; ++j)
    for (int r = 0; r < R; ++r) scores[r * stride + j] = score_alone(queries[r], keys + j, size, page);
}

// A tail of values that fills no register. Never inlined, as `score_alone`.
__attribute__((noinline)) float accumulate_alone(float total, const float* weights, const float* values, int first, int last,
                                                 int size) {
  for (int j = first; j < last; ++j) total += weights[j] * values[j * size];
  return total;
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
  for (; d + 8 <= size; d += 8) {
    Floats a = load(out + d) * keep;
    for (int j = first; j < last; ++j) a += weights[j] * load(values + j * size + d);
    store(out + d, a);
  }
  for (; d < size; ++d) out[d] = accumulate_alone(out[d] * keep, weights, values + d, first, last, size);
}

// Neighbouring pages, widened: those from `first` to `last` - 1 of the span; the others are not read.
struct PageSpan {
  const float* keys[kSpanPages] = {};
  const float* values[kSpanPages] = {};
  int start = 0, first = 0, last = 0;  // start: position of the span's first page, read or not
  int page = 0, size = 0;              // positions of a page, numbers of a head
};

// Scores of positions first … last-1 of a span into the running softmax of one row. Lanes outside hold rubbish, which
// is replaced before it is counted; scores has room for whole registers.
inline void absorb(float* scores, int first, int last, const AttentionQueries& q, float* state, const PageSpan& span, float* out) {
  const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  Floats tops = all(kNothing);
  for (int j = first / 8 * 8; j < last; j += 8) {
    Floats s = load(scores + j) * q.scale;
    if (q.soft_cap != 0) s = q.soft_cap * hyperbolic_tangent(s / q.soft_cap);
    s = ((lanes + j >= first) & (lanes + j < last)) ? s : all(kNothing);
    store(scores + j, s);
    tops = larger(tops, s);
  }
  const float top = largest(tops), maximum = top > state[0] ? top : state[0];
  const float keep = exponential(all(state[0] - maximum))[0];
  Floats total = {};
  for (int j = first / 8 * 8; j < last; j += 8) {
    const Floats power = exponential(load(scores + j) - maximum);
    store(scores + j, power);
    total += power;
  }
  state[0] = maximum;
  state[1] = state[1] * keep + sum(total);
  for (int number = first / span.page, begin = number * span.page; begin < last; ++number, begin += span.page) {
    const int from = first > begin ? first - begin : 0, to = last - begin < span.page ? last - begin : span.page;
    accumulate(out, begin <= first ? keep : 1.0f, scores + begin, span.values[number], from, to, span.size);
  }
}

// Where a row's query and output lie.
inline int64_t row_place(const AttentionQueries& q, int row, int size) {
  return row / q.heads * q.token_stride + static_cast<int64_t>(row % q.heads) * size;
}

constexpr int kTogether = 4;  // rows that read keys from a register together

// One span for all rows.
inline void attend_span(const AttentionQueries& q, const PageSpan& span, float* scores, int64_t stride, float* states) {
  const int rows = q.tokens * q.heads, page = span.page, size = span.size;
  for (int first = 0; first < rows; first += kTogether) {
    const int count = rows - first < kTogether ? rows - first : kTogether;
    const int latest = q.position + (first + count - 1) / q.heads;
    const float* queries[kTogether];
    for (int r = 0; r < kTogether; ++r) queries[r] = q.queries + row_place(q, first + (r < count ? r : 0), size);
    for (int number = span.first; number < span.last && span.start + number * page <= latest; ++number) {
      float* into = scores + number * page;
      if (count == kTogether) {
        score<kTogether>(queries, span.keys[number], size, page, into, stride);
      } else {
        for (int r = 0; r < count; ++r) score<1>(queries + r, span.keys[number], size, page, into + r * stride, stride);
      }
    }
    for (int r = 0; r < count; ++r) {
      const int position = q.position + (first + r) / q.heads, end = position + 1 - span.start;
      const int seen = end < span.last * page ? end : span.last * page;
      const int lost = q.window > 0 && end > q.window ? end - q.window : 0;
      if (lost >= seen) continue;
      absorb(scores + r * stride, lost, seen, q, states + 2 * (first + r), span, q.out + row_place(q, first + r, size));
    }
  }
}

void attend(const CacheLayer& cache, const AttentionQueries& q, float* scratch) {
  const int size = cache.head_size, page = cache.page_size, rows = q.tokens * q.heads, pages = span_pages(cache);
  const int64_t slab = static_cast<int64_t>(size) * page, stride = (pages * page + 7) / 8 * 8;
  float* wide_keys = scratch;
  float* wide_values = wide_keys + pages * slab;
  float* scores = wide_values + pages * slab;
  float* states = scores + kTogether * stride;
  for (int row = 0; row < rows; ++row) {
    states[2 * row] = kNothing;
    states[2 * row + 1] = 0;
    float* out = q.out + row_place(q, row, size);
    for (int d = 0; d < size; ++d) out[d] = 0;
  }
  const int oldest = (q.window > 0 && q.position + 1 > q.window ? q.position + 1 - q.window : 0) / page;
  const int newest = (q.position + q.tokens - 1) / page;
  PageSpan span;
  span.page = page;
  span.size = size;
  for (int start = oldest / pages * pages; start <= newest; start += pages) {
    span.start = start * page;
    span.first = oldest > start ? oldest - start : 0;
    span.last = newest - start + 1 < pages ? newest - start + 1 : pages;
    for (int number = span.first; number < span.last; ++number) {
      const int64_t slab_number = static_cast<int64_t>(q.pages[start + number]) * cache.kv_heads + q.kv_head;
      span.keys[number] = widen_keys(cache, slab_number, wide_keys + number * slab);
      span.values[number] = widen_values(cache, slab_number, wide_values + number * slab);
    }
    attend_span(q, span, scores, stride, states);
  }
  for (int row = 0; row < rows; ++row) {
    float* out = q.out + row_place(q, row, size);
    const float share = 1.0f / states[2 * row + 1];
    for (int d = 0; d < size; ++d) out[d] *= share;
  }
}

// One head of one position as codes from -127 to 127; `stride` apart. Returns their scale.
inline float store_codes(const float* x, int size, int8_t* codes, int64_t stride) {
  float top = 0;
  for (int d = 0; d < size; ++d) {
    const float magnitude = x[d] < 0 ? -x[d] : x[d];
    top = magnitude > top ? magnitude : top;
  }
  const float inverse = top > 0 ? 127.0f / top : 0.0f;
  for (int d = 0; d < size; ++d) codes[d * stride] = static_cast<int8_t>(to_nearest(all(x[d] * inverse))[0]);
  return top / 127.0f;
}

void store_coded(const CacheLayer& cache, int page, int slot, const float* keys, const float* values) {
  const int size = cache.head_size, length = cache.page_size;
  for (int head = 0; head < cache.kv_heads; ++head) {
    const int64_t number = static_cast<int64_t>(page) * cache.kv_heads + head, slab = number * size * length;
    int8_t* key_codes = static_cast<int8_t*>(cache.keys) + slab + slot;
    int8_t* value_codes = static_cast<int8_t*>(cache.values) + slab + static_cast<int64_t>(slot) * size;
    cache.key_scales[number * length + slot] = store_codes(keys + head * size, size, key_codes, length);
    cache.value_scales[number * length + slot] = store_codes(values + head * size, size, value_codes, 1);
  }
}

void store_keys_values(const CacheLayer& cache, int page, int slot, const float* keys, const float* values) {
  if (cache.type == Number::int8) return store_coded(cache, page, slot, keys, values);
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
