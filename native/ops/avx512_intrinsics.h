// The intrinsics of AVX-512 F, BW, VL, DQ and VNNI: the compiler's own, or SIMDe's in a build with FETTLE_EMULATE.
//
// SIMDe (https://github.com/simd-everywhere/simde) computes what an instruction is documented to compute, with those that
// the machine has. So kernels are compared with the portable ones on any x86 machine; such a build is for tests alone.
#pragma once

#if defined(FETTLE_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

namespace fettle {
namespace {

// What SIMDe 0.7.4 lacks.
inline simde__m512 emulated_mm512_cvtepi32_ps(simde__m512i value) {
  simde__m512i_private from = simde__m512i_to_private(value);
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = static_cast<float>(from.i32[i]);
  return simde__m512_from_private(to);
}

}  // namespace
}  // namespace fettle

#define _mm512_cvtepi32_ps(value) emulated_mm512_cvtepi32_ps(value)
#else
#include <immintrin.h>
#endif
