// The kernels for processors with AVX2, FMA and F16C; compiled with those flags.

#include <cstring>

#include "ops/attention.h"
#include "ops/float_matmul.h"
#include "ops/integer_avx2.h"
#include "ops/kernels.h"
#include "ops/quantize_inputs.h"
#include "ops/rows.h"
#include "ops/sparse_avx2.h"

namespace fettle {
namespace {

uint64_t read_bytes(const uint8_t* from, int64_t bytes) {
  __m256i sums[8];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int k = 0; k < 8; ++k) sums[k] = _mm256_xor_si256(sums[k], load_bytes(from + i + 32 * k));
  for (int k = 1; k < 8; ++k) sums[0] = _mm256_xor_si256(sums[0], sums[k]);
  uint64_t words[4];
  std::memcpy(words, &sums[0], sizeof words);
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

// What integer_avx2.h does at its best: multiply 32 pairs of bytes, add them up in 16 bits.
int64_t multiply_adds(int64_t rounds) {
  constexpr int kSums = 12;
  __m256i sums[kSums], units = _mm256_set1_epi8(3), inputs = _mm256_set1_epi8(-5);
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) {
      __m256i product;  // by name, or the compiler would multiply once
      asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(units), "x"(inputs));
      sums[k] = _mm256_add_epi16(sums[k], product);
      settle(sums[k]);
    }
  }
  for (int k = 1; k < kSums; ++k) sums[0] = _mm256_xor_si256(sums[0], sums[k]);
  asm volatile("" : : "x"(sums[0]));
  return rounds * kSums * 32;
}

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels table = {
      "avx2", quantize_inputs, coded_integer_matmul, coded_float_matmul, dense_matmul, coded_row, dense_row,
      rms_norm, layer_norm, rotate, activate, soft_cap, attend, read_bytes, multiply_adds, store_keys_values,
      sparse_integer, sparse_float, sparse_values, sparse_row, sparse_values_row,
  };
  return table;
}

}  // namespace fettle
