#include "ops/kernels.h"

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

int64_t attention_scratch(const CacheLayer& cache, int tokens, int heads) {
  const int64_t rows = static_cast<int64_t>(tokens) * heads, page = cache.page_size;
  // a page's keys or values in float32, scores of all rows, maximum and sum of each row
  return page * cache.head_size + pages_together(cache.page_size) * (page + 8) * rows + 2 * rows + 64;
}

}  // namespace fettle
