// The kernels for Arm processors with dot products of bytes (Armv8.2 and later); compiled with that flag.
//
// All Armv8 processors have NEON, so the portable kernels, which are vectors of the compiler, use it already. What is here
// is what those cannot say: products of bytes.

#include <cstring>

#include "ops/integer_neon.h"
#include "ops/kernels.h"

namespace fettle {
namespace {

uint64_t read_bytes(const uint8_t* from, int64_t bytes) {
  uint8x16_t sums[8];
  for (uint8x16_t& sum : sums) sum = vdupq_n_u8(0);
  for (int64_t i = 0; i + 128 <= bytes; i += 128)
    for (int k = 0; k < 8; ++k) sums[k] = veorq_u8(sums[k], vld1q_u8(from + i + 16 * k));
  for (int k = 1; k < 8; ++k) sums[0] = veorq_u8(sums[0], sums[k]);
  const uint64x2_t words = vreinterpretq_u64_u8(sums[0]);
  return vgetq_lane_u64(words, 0) ^ vgetq_lane_u64(words, 1);
}

// What integer_neon.h does at its best: multiply 16 pairs of bytes and add them up in 32 bits.
int64_t multiply_adds(int64_t rounds) {
  constexpr int kSums = 16;
  int32x4_t sums[kSums];
  int8x16_t units = vdupq_n_s8(3), inputs = vdupq_n_s8(-5);
  for (int32x4_t& sum : sums) sum = vdupq_n_s32(0);
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+w"(units), "+w"(inputs));  // or the products would be taken out of the loop
    for (int32x4_t& sum : sums) sum = vdotq_s32(sum, units, inputs);
  }
  for (int k = 1; k < kSums; ++k) sums[0] = veorq_s32(sums[0], sums[k]);
  asm volatile("" : : "w"(sums[0]));
  return rounds * kSums * 16;
}

}  // namespace

const Kernels& neon_dot_kernels() {
  static const Kernels table = [] {
    Kernels made = portable_kernels();
    made.name = "neon_dot";
    made.coded_integer = coded_integer_dot;
    made.read_bytes = read_bytes;
    made.multiply_adds = multiply_adds;
    return made;
  }();
  return table;
}

}  // namespace fettle
