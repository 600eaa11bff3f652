// One step (4 columns) of 8 sums at once, 2 tiles × 4 tokens, as a block of assembly.
//
// Eight sums, the units and two products fill the register file. Left to choose, gcc keeps the sums in memory and adds a
// load and a store to each of them, which takes three times as long; a block of assembly has its operands in registers.
// The peak that speed is held against (kernels_avx2.cpp) is that of the same instructions without any of the loads.
#pragma once

#include "ops/integer_registers_avx2.h"

namespace fettle {
namespace {

using Four = const int32_t;  // the codes of a token for one step

inline const Four& four_of(const int8_t* codes) { return *reinterpret_cast<const Four*>(codes); }

#define FETTLE_TWO_TILES(x, low, high)                                        \
  "vpbroadcastd %[" x "], %[c]\n\t"                                           \
  "vpmaddubsw %[c], %[a], %[p]\n\t"                                           \
  "vpmaddubsw %[c], %[b], %[q]\n\t"                                           \
  "vpaddw %[p], %[" low "], %[" low "]\n\t"                                   \
  "vpaddw %[q], %[" high "], %[" high "]\n\t"

// sums[tile][token] += units of the tile × codes of the token, in 16 bits; the codes of two tokens lie `stride` apart
inline void add_step(__m256i (&s)[2][4], const __m256i (&units)[2], const int8_t* codes, int64_t stride) {
  __m256i c, p, q;
  asm(FETTLE_TWO_TILES("x0", "s0", "t0") FETTLE_TWO_TILES("x1", "s1", "t1") FETTLE_TWO_TILES("x2", "s2", "t2")
          FETTLE_TWO_TILES("x3", "s3", "t3")
      : [s0] "+x"(s[0][0]), [s1] "+x"(s[0][1]), [s2] "+x"(s[0][2]), [s3] "+x"(s[0][3]), [t0] "+x"(s[1][0]),
        [t1] "+x"(s[1][1]), [t2] "+x"(s[1][2]), [t3] "+x"(s[1][3]), [c] "=&x"(c), [p] "=&x"(p), [q] "=&x"(q)
      : [a] "x"(units[0]), [b] "x"(units[1]), [x0] "m"(four_of(codes)), [x1] "m"(four_of(codes + stride)),
        [x2] "m"(four_of(codes + 2 * stride)), [x3] "m"(four_of(codes + 3 * stride)));
}

#undef FETTLE_TWO_TILES
#define FETTLE_SIGNED(x, low, high)                                           \
  "vpbroadcastd %[" x "], %[c]\n\t"                                           \
  "vpsignb %[a], %[c], %[p]\n\t"                                              \
  "vpsignb %[b], %[c], %[c]\n\t"                                              \
  "vpmaddubsw %[p], %[u], %[p]\n\t"                                           \
  "vpmaddubsw %[c], %[v], %[c]\n\t"                                           \
  "vpmaddwd %[one], %[p], %[p]\n\t"                                           \
  "vpmaddwd %[one], %[c], %[c]\n\t"                                           \
  "vpaddd %[p], %[" low "], %[" low "]\n\t"                                   \
  "vpaddd %[c], %[" high "], %[" high "]\n\t"

// The same for signed units, in 32 bits: two products of such bytes fill 16.
inline void add_signed_step(__m256i (&s)[2][4], const __m256i (&units)[2], const int8_t* codes, int64_t stride) {
  __m256i c, p;
  asm(FETTLE_SIGNED("x0", "s0", "t0") FETTLE_SIGNED("x1", "s1", "t1") FETTLE_SIGNED("x2", "s2", "t2")
          FETTLE_SIGNED("x3", "s3", "t3")
      : [s0] "+x"(s[0][0]), [s1] "+x"(s[0][1]), [s2] "+x"(s[0][2]), [s3] "+x"(s[0][3]), [t0] "+x"(s[1][0]),
        [t1] "+x"(s[1][1]), [t2] "+x"(s[1][2]), [t3] "+x"(s[1][3]), [c] "=&x"(c), [p] "=&x"(p)
      : [a] "x"(units[0]), [b] "x"(units[1]), [u] "x"(_mm256_abs_epi8(units[0])), [v] "x"(_mm256_abs_epi8(units[1])),
        [one] "x"(_mm256_set1_epi16(1)), [x0] "m"(four_of(codes)), [x1] "m"(four_of(codes + stride)),
        [x2] "m"(four_of(codes + 2 * stride)), [x3] "m"(four_of(codes + 3 * stride)));
}

#undef FETTLE_SIGNED

// Any other shape.
template <int TILES, int TOKENS>
inline void add_step(__m256i (&s)[TILES][TOKENS], const __m256i (&units)[TILES], const int8_t* codes, int64_t stride) {
  for (int t = 0; t < TOKENS; ++t) {
    const __m256i x = repeat_four(codes + t * stride);
    for (int r = 0; r < TILES; ++r) {
      s[r][t] = _mm256_add_epi16(s[r][t], _mm256_maddubs_epi16(units[r], x));
      settle(s[r][t]);
    }
  }
}

template <int TILES, int TOKENS>
inline void add_signed_step(__m256i (&s)[TILES][TOKENS], const __m256i (&units)[TILES], const int8_t* codes, int64_t stride) {
  for (int t = 0; t < TOKENS; ++t) {
    const __m256i x = repeat_four(codes + t * stride);
    for (int r = 0; r < TILES; ++r) {
      const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(units[r]), _mm256_sign_epi8(x, units[r]));
      s[r][t] = _mm256_add_epi32(s[r][t], widen_pairs(products));
      settle(s[r][t]);
    }
  }
}

}  // namespace
}  // namespace fettle
