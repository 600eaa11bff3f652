// Which instruction sets this processor has, and which kernels therefore run.
#pragma once

#include <string>

namespace fettle {

struct Features {
  bool avx2 = false;        // with FMA and F16C, which every AVX2 processor since 2013 has, and with the system's consent
  bool avx512_vnni = false; // told to people; no kernel here uses it yet
};

Features features();

// "avx2" or "portable": the fastest kernels that this processor runs and this build has.
std::string best_instructions();

}  // namespace fettle
