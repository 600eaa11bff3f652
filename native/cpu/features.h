// Which instruction sets this processor has, and which kernels therefore run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fettle {

struct Features {
  bool avx2 = false;         // with FMA and F16C, and registers of 256 bits that the system saves
  bool avx512_vnni = false;  // F, BW, DQ, VL and VNNI beside AVX2, and registers of 512 bits that the system saves
  bool neon_dot = false;     // the dot products of bytes of Armv8.2
};

// What an x86 processor says of itself (leaves 1 and 7 of cpuid) and what the system saves of it (xgetbv, 0 without
// OSXSAVE): apart from asking, so that processors that are not at hand can be tested.
struct X86Words {
  uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0;
  uint64_t saved_state = 0;
};
Features read_features(const X86Words& words);

Features features();

// The kernels that this build has and this processor runs, the fastest first; the last is always "portable".
std::vector<std::string> available_instructions();

// What runs where nothing is asked for: FETTLE_INSTRUCTIONS of the environment where it is set, else the first of them.
std::string best_instructions();

}  // namespace fettle
