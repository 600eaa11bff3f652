#include "ops/kernels.h"

#include <stdexcept>

#include "cpu/features.h"

namespace fettle {

const Kernels& find_kernels(const std::string& name) {
  const std::string wanted = name.empty() ? best_instructions() : name;
  if (wanted == "portable") return portable_kernels();
#if defined(FETTLE_HAS_AVX2)
  if (wanted == "avx2") {
    if (!features().avx2) throw std::invalid_argument("this processor has no AVX2 with FMA and F16C; use \"portable\"");
    return avx2_kernels();
  }
#endif
  throw std::invalid_argument("there are no kernels called \"" + wanted + "\" in this build; there are \"portable\"" +
#if defined(FETTLE_HAS_AVX2)
                              " and \"avx2\"" +
#endif
                              "");
}

int64_t attention_scratch(const CacheLayer& cache, int tokens, int heads) {
  const int64_t rows = static_cast<int64_t>(tokens) * heads, page = cache.page_size;
  // a page's keys and values in float32, scores of a few rows, maximum and sum of each row
  return 2 * page * cache.head_size + 4 * (page + 8) + 2 * rows + 64;
}

}  // namespace fettle
