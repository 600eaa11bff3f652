// The kernels for processors with AVX-512 VNNI (Zen 4, Ice Lake and later); compiled with those flags.
//
// Integer products are what VNNI changes: four products an instruction in place of three instructions for two. All other
// ops are the functions of the AVX2 table themselves, not compiled again: a Zen 4 multiplies floats no faster in 512 bits,
// and what is the same code is the same to the bit.

#include <cstring>

#include "ops/integer_avx512.h"
#include "ops/kernels.h"

namespace fettle {
namespace {

// What integer_avx512.h does at its best: multiply 64 pairs of bytes and add them up in 32 bits.
int64_t multiply_adds(int64_t rounds) {
  constexpr int kSums = 16;
  __m512i sums[kSums], units = _mm512_set1_epi32(0x03030303), inputs = _mm512_set1_epi32(-5);
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t round = 0; round < rounds; ++round) {
#if !defined(FETTLE_EMULATE)
    asm volatile("" : "+v"(units), "+v"(inputs));  // or the products would be taken out of the loop
#endif
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, units, inputs);
  }
  for (int k = 1; k < kSums; ++k) sums[0] = _mm512_xor_si512(sums[0], sums[k]);
  volatile int32_t kept[16];
  std::memcpy(const_cast<int32_t*>(kept), &sums[0], sizeof sums[0]);
  return rounds * kSums * 64;
}

}  // namespace

const Kernels& avx512_vnni_kernels() {
  static const Kernels table = [] {
    Kernels made = avx2_kernels();
    made.name = "avx512_vnni";
    made.coded_integer = coded_integer_vnni;
    made.multiply_adds = multiply_adds;
    return made;
  }();
  return table;
}

}  // namespace fettle
