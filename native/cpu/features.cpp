#include "cpu/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fettle {

Features features() {
  Features found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && ((c >> 29) & 1u);
  // The builtin asks the system too: registers that it does not save are none.
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  found.avx512_vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
#endif
  return found;
}

std::string best_instructions() {
#if defined(FETTLE_HAS_AVX2)
  if (features().avx2) return "avx2";
#endif
  return "portable";
}

}  // namespace fettle
