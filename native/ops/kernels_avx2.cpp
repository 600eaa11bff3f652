// The kernels for processors with AVX2, FMA and F16C; compiled with those flags.

#include "ops/attention.h"
#include "ops/float_matmul.h"
#include "ops/integer_avx2.h"
#include "ops/kernels.h"
#include "ops/quantize_inputs.h"
#include "ops/rows.h"

namespace fettle {

const Kernels& avx2_kernels() {
  static const Kernels table = {
      "avx2",     quantize_inputs, coded_integer_matmul, coded_float_matmul, dense_matmul, coded_row, dense_row, rms_norm,
      layer_norm, rotate,          activate,             soft_cap,           attend,       store_keys_values,
  };
  return table;
}

}  // namespace fettle
