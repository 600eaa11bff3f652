// Attention over a paged cache, some dozens of positions at a time with the online softmax (Milakov and Gimelshein 2018,
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
  for (; i + 32 <= count; i += 32)
    for (int part = 0; part < 32; part += 8) store(scratch + i + part, load_number(from, type, first + i + part));
  for (; i + 8 <= count; i += 8) store(scratch + i, load_number(from, type, first + i));
  const uint16_t* half = static_cast<const uint16_t*>(from) + first;
  for (; i < count; ++i) scratch[i] = type == Number::float16 ? from_float16(half[i]) : from_bfloat16(half[i]);
  return scratch;
}

// A page's keys [head_size][page] or values [page][head_size] of one head as floats. A scale of codes belongs to a
// position, which is a column of keys and a row of values.
template <bool KEYS>
inline const float* widen_page(const CacheLayer& cache, int64_t slab_number, float* scratch) {
  const int outer = KEYS ? cache.head_size : cache.page_size, inner = KEYS ? cache.page_size : cache.head_size;
  const int64_t slab = static_cast<int64_t>(outer) * inner, first = slab_number * slab;
  const void* numbers = KEYS ? cache.keys : cache.values;
  if (cache.type != Number::int8) return widen(numbers, cache.type, first, slab, scratch);
  const int8_t* codes = static_cast<const int8_t*>(numbers) + first;
  const float* scales = (KEYS ? cache.key_scales : cache.value_scales) + slab_number * cache.page_size;
  for (int i = 0; i < outer; ++i)
    for (int j = 0; j < inner; ++j) scratch[i * inner + j] = static_cast<float>(codes[i * inner + j]) * scales[KEYS ? j : i];
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

// One number of a row's output; never inlined, as score_alone.
__attribute__((noinline)) float accumulate_alone(float total, const float* weights, const float* values, int first, int last,
                                                 int size) {
  for (int j = first; j < last; ++j) total += weights[j] * values[j * size];
  return total;
}

// outs[r] += Σ_j weights[r][j] · values[j], j from first to last-1, for R rows that read the values together
template <int R>
inline void accumulate(float* const* outs, const float* const* weights, const float* values, int first, int last, int size) {
  int d = 0;
  for (; d + 16 <= size; d += 16) {
    Floats low[R], high[R];
    for (int r = 0; r < R; ++r) {
      low[r] = load(outs[r] + d);
      high[r] = load(outs[r] + d + 8);
    }
    for (int j = first; j < last; ++j) {
      const Floats a = load(values + j * size + d), b = load(values + j * size + d + 8);
      for (int r = 0; r < R; ++r) {
        const Floats weight = all(weights[r][j]);
        low[r] += weight * a;
        high[r] += weight * b;
      }
    }
    for (int r = 0; r < R; ++r) {
      store(outs[r] + d, low[r]);
      store(outs[r] + d + 8, high[r]);
    }
  }
  for (; d + 8 <= size; d += 8) {
    Floats sums[R];
    for (int r = 0; r < R; ++r) sums[r] = load(outs[r] + d);
    for (int j = first; j < last; ++j) {
      const Floats value = load(values + j * size + d);
      for (int r = 0; r < R; ++r) sums[r] += all(weights[r][j]) * value;
    }
    for (int r = 0; r < R; ++r) store(outs[r] + d, sums[r]);
  }
  for (; d < size; ++d)
    for (int r = 0; r < R; ++r) outs[r][d] = accumulate_alone(outs[r][d], weights[r], values + d, first, last, size);
}

// Divisions cost as much as a row's other work on a page, and one token, in decoding, needs none.
inline int token_of(const AttentionQueries& q, int row) { return q.tokens == 1 ? 0 : row / q.heads; }

// Where a row's query and output lie.
inline int64_t row_place(const AttentionQueries& q, int row, int size) {
  const int token = token_of(q, row);
  return token * q.token_stride + static_cast<int64_t>(row - token * q.heads) * size;
}

// Positions that a row sees, in a page that begins at `start`: from first to last-1, counted in the page.
struct Seen {
  int first, last;
  bool none() const { return first >= last; }
  bool operator==(const Seen& other) const { return first == other.first && last == other.last; }
};

inline Seen seen_of(const AttentionQueries& q, int row, int start, int page) {
  const int position = q.position + token_of(q, row), end = position + 1 - start;
  const int lost = q.window > 0 ? end - q.window : 0;
  return Seen{lost > 0 ? lost : 0, end < page ? end : page};
}

constexpr int kTogether = 4;  // rows that read keys and values from a register together

// Neighbouring pages [first, last] of one group.
struct PageGroup {
  const CacheLayer& cache;
  const AttentionQueries& q;
  int first, last;
  int64_t stride;
  float* wide;    // one page's keys or values
  float* scores;  // [row][most][stride]
  float* states;  // [row]: maximum and sum
  int most;       // pages of a whole group

  int rows() const { return q.tokens * q.heads; }
  int start_of(int page) const { return page * cache.page_size; }
  int64_t slab(int page) const { return static_cast<int64_t>(q.pages[page]) * cache.kv_heads + q.kv_head; }
  float* of(int row, int page) const { return scores + (static_cast<int64_t>(row) * most + page - first) * stride; }
  Seen seen(int row, int page) const { return seen_of(q, row, start_of(page), cache.page_size); }
};

inline void score_page(const PageGroup& group, int page) {
  const AttentionQueries& q = group.q;
  const int size = group.cache.head_size, length = group.cache.page_size, rows = group.rows();
  const float* keys = widen_page<true>(group.cache, group.slab(page), group.wide);
  for (int row = 0; row < rows; row += kTogether) {
    const int count = rows - row < kTogether ? rows - row : kTogether;
    if (group.seen(row + count - 1, page).last <= 0) continue;  // the page is later than all of them
    const float* queries[kTogether];
    for (int r = 0; r < count; ++r) queries[r] = q.queries + row_place(q, row + r, size);
    if (count == kTogether) {
      score<kTogether>(queries, keys, size, length, group.of(row, page), group.most * group.stride);
    } else {
      for (int r = 0; r < count; ++r) score<1>(queries + r, keys, size, length, group.of(row + r, page), 0);
    }
  }
}

// A row's scores become their powers, its maximum and sum are brought up to date, and its output is scaled down to the
// new maximum. Lanes that it does not see hold rubbish, which is replaced before it is counted.
inline void absorb(const PageGroup& group, int row) {
  const AttentionQueries& q = group.q;
  const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  float* scores = group.of(row, group.first);
  const int64_t count = (group.last - group.first + 1) * group.stride;
  Floats tops = all(kNothing);
  bool any = false;
  for (int page = group.first; page <= group.last; ++page) {
    const Seen seen = group.seen(row, page);
    any |= !seen.none();
    for (int j = 0; j < group.stride; j += 8) {
      float* at = group.of(row, page) + j;
      Floats s = all(kNothing);
      if (j + 8 > seen.first && j < seen.last) {
        s = load(at) * q.scale;
        if (q.soft_cap != 0) s = q.soft_cap * hyperbolic_tangent(s / q.soft_cap);
        s = ((lanes + j >= seen.first) & (lanes + j < seen.last)) ? s : all(kNothing);
      }
      store(at, s);
      tops = larger(tops, s);
    }
  }
  if (!any) return;
  float* state = group.states + 2 * row;
  const float top = largest(tops), maximum = top > state[0] ? top : state[0];
  const float keep = exponential(all(state[0] - maximum))[0];
  Floats total = {};
  for (int64_t j = 0; j < count; j += 8) {
    const Floats power = exponential(load(scores + j) - maximum);
    store(scores + j, power);
    total += power;
  }
  state[0] = maximum;
  state[1] = state[1] * keep + sum(total);
  if (keep == 1.0f) return;
  float* out = q.out + row_place(q, row, group.cache.head_size);
  for (int d = 0; d < group.cache.head_size; ++d) out[d] *= keep;
}

inline void accumulate_page(const PageGroup& group, int page) {
  const AttentionQueries& q = group.q;
  const int size = group.cache.head_size, rows = group.rows();
  const float* values = widen_page<false>(group.cache, group.slab(page), group.wide);
  for (int row = 0; row < rows; row += kTogether) {
    const int count = rows - row < kTogether ? rows - row : kTogether;
    float* outs[kTogether];
    const float* weights[kTogether];
    bool alike = count == kTogether;
    for (int r = 0; r < count; ++r) {
      outs[r] = q.out + row_place(q, row + r, size);
      weights[r] = group.of(row + r, page);
      alike &= group.seen(row + r, page) == group.seen(row, page);
    }
    const Seen seen = group.seen(row, page);
    if (alike && !seen.none()) accumulate<kTogether>(outs, weights, values, seen.first, seen.last, size);
    for (int r = 0; r < count && !alike; ++r) {
      const Seen own = group.seen(row + r, page);
      if (!own.none()) accumulate<1>(outs + r, weights + r, values, own.first, own.last, size);
    }
  }
}

void attend(const CacheLayer& cache, const AttentionQueries& q, float* scratch) {
  const int size = cache.head_size, page = cache.page_size, rows = q.tokens * q.heads;
  const int most = pages_together(page);
  const int64_t stride = (page + 7) / 8 * 8;
  float* wide = scratch;
  float* states = wide + static_cast<int64_t>(size) * page;
  float* scores = states + 2 * rows;
  for (int row = 0; row < rows; ++row) {
    states[2 * row] = kNothing;
    states[2 * row + 1] = 0;
    float* out = q.out + row_place(q, row, size);
    for (int d = 0; d < size; ++d) out[d] = 0;
  }
  const int oldest = q.window > 0 && q.position + 1 > q.window ? (q.position + 1 - q.window) / page : 0;
  const int newest = (q.position + q.tokens - 1) / page;
  // Groups begin at the same pages whatever is asked, so that a row's sums do not depend on what runs beside it.
  for (int first = oldest / most * most; first <= newest; first += most) {
    const int last = first + most - 1;
    const int from = first < oldest ? oldest : first, to = last < newest ? last : newest;
    const PageGroup group{cache, q, from, to, stride, wide, scores, states, most};
    for (int number = group.first; number <= group.last; ++number) score_page(group, number);
    for (int row = 0; row < rows; ++row) absorb(group, row);
    for (int number = group.first; number <= group.last; ++number) accumulate_page(group, number);
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
