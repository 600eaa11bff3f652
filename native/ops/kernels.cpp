#include "ops/kernels.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/features.h"

namespace fettle {

const Kernels& find_kernels(const std::string& name) {
  const std::string wanted = name.empty() ? best_instructions() : name;
  std::string known;
  for (const std::string& there : available_instructions()) {
    known += (known.empty() ? "\"" : ", \"") + there + "\"";
    if (there != wanted) continue;
#if defined(FETTLE_HAS_AVX512)
    if (wanted == "avx512_vnni") return avx512_vnni_kernels();
#endif
#if defined(FETTLE_HAS_AVX2)
    if (wanted == "avx2") return avx2_kernels();
#endif
#if defined(FETTLE_HAS_NEON)
    if (wanted == "neon_dot") return neon_dot_kernels();
#endif
    return portable_kernels();
  }
  throw std::invalid_argument("there are no kernels called \"" + wanted + "\" in this build and for this processor; there are " + known);
}

int span_pages(const CacheLayer& cache) {
  const int positions = std::clamp(2048 / cache.head_size, 16, kSpanPages);
  return std::max(1, positions / cache.page_size);
}

int64_t attention_scratch(const CacheLayer& cache, int tokens, int heads) {
  const int64_t rows = static_cast<int64_t>(tokens) * heads, positions = int64_t{span_pages(cache)} * cache.page_size;
  // a span's keys and values in float32, scores of a few rows, maximum and sum of each row
  return 2 * positions * cache.head_size + 4 * (positions + 8) + 2 * rows + 64;
}

}  // namespace fettle
