#include "ops/matmul.h"

#include <algorithm>

namespace fettle {

void Matrix::row(const Kernels& kernels, int index, float* out) const {
  if (coded_) {
    kernels.coded_row(coded_->view(), index, out);
  } else {
    kernels.dense_row(dense_->view(), index, out);
  }
}

const QuantizedInputs& Inputs::quantized(const Cut& cut, const Kernels& kernels, ThreadPool& pool) {
  if (ready_ && cut == cut_) return quantized_;
  const size_t tokens = static_cast<size_t>(tokens_), blocks = static_cast<size_t>(cut.blocks());
  codes_.resize(std::max(codes_.size(), tokens * cut.padded()));
  scales_.resize(std::max(scales_.size(), tokens * blocks));
  sums_.resize(std::max(sums_.size(), tokens * blocks));
  pairs_.resize(std::max(pairs_.size(), tokens * cut.chunks * 2));
  const InputBuffers to{codes_.data(), scales_.data(), sums_.data(), pairs_.data()};
  pool.run(tokens_, 8, [&](int64_t first, int64_t last) {
    kernels.quantize_inputs(values_, cut, static_cast<int>(first), static_cast<int>(last), to);
  });
  quantized_ = QuantizedInputs{tokens_, codes_.data(), scales_.data(), sums_.data(), pairs_.data()};
  cut_ = cut;
  ready_ = true;
  return quantized_;
}

namespace {

void multiply_span(const Product& product, const Inputs& inputs, const QuantizedInputs* quantized, Span span,
                   const Kernels& kernels) {
  if (const CodedMatrix* coded = product.matrix->coded()) {
    if (quantized != nullptr) {
      kernels.coded_integer(*coded, *quantized, span, product.out, product.stride);
    } else {
      kernels.coded_float(*coded, inputs.values(), inputs.tokens(), span, product.out, product.stride);
    }
    return;
  }
  kernels.dense(*product.matrix->dense(), inputs.values(), inputs.tokens(), span, product.out, product.stride);
}

constexpr int64_t kGrain = 4;  // tiles that a thread takes at the least; kernels take two at once

}  // namespace

void multiply(const std::vector<Product>& products, Inputs& inputs, bool integer, const Kernels& kernels, ThreadPool& pool) {
  size_t done = 0;
  while (done < products.size()) {
    // Products that read the same bytes go together; all do, unless a recipe gave them different groups.
    const CodedMatrix* coded = products[done].matrix->coded();
    const QuantizedInputs* quantized =
        integer && coded != nullptr ? &inputs.quantized(coded->cut, kernels, pool) : nullptr;
    size_t last = done + 1;
    int64_t tiles = products[done].matrix->tiles();
    for (; last < products.size(); ++last) {
      const CodedMatrix* other = products[last].matrix->coded();
      const bool same = integer && other != nullptr ? quantized != nullptr && other->cut == coded->cut : quantized == nullptr;
      if (!same) break;
      tiles += products[last].matrix->tiles();
    }
    pool.run(tiles, kGrain, [&](int64_t first, int64_t end) {
      int64_t start = 0;  // of the product among all tiles
      for (size_t i = done; i < last; ++i) {
        const int64_t own = products[i].matrix->tiles();
        const Span span{static_cast<int>(std::max<int64_t>(first - start, 0)),
                        static_cast<int>(std::min(end - start, own))};
        if (span.first < span.last) multiply_span(products[i], inputs, quantized, span, kernels);
        start += own;
      }
    });
    done = last;
  }
}

}  // namespace fettle
