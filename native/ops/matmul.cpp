#include "ops/matmul.h"

#include <algorithm>

namespace fettle {
namespace {

template <typename View>
int rows_of(const View& view) {
  return view.rows;
}
int rows_of(const SparseMatrix& view) { return view.exact.rows; }

}  // namespace

const Cut* Matrix::cut() const {
  if (const SparseMatrix* found = sparse()) return &found->exact.cut;
  const CodedMatrix* found = coded();
  return found != nullptr ? &found->cut : nullptr;
}

int Matrix::rows() const {
  return std::visit([](const auto& stored) { return rows_of(stored.view()); }, stored_);
}

int Matrix::columns() const {
  if (const Cut* found = cut()) return found->columns;
  return dense() != nullptr ? dense()->columns : sparse_values()->columns;
}

int Matrix::tiles() const { return (rows() + kTileRows - 1) / kTileRows; }

size_t Matrix::bytes() const {
  return std::visit([](const auto& stored) { return stored.bytes(); }, stored_);
}

void Matrix::row(const Kernels& kernels, int index, float* out) const {
  if (const CodedMatrix* found = coded()) return kernels.coded_row(*found, index, out);
  if (const SparseMatrix* found = sparse()) return kernels.sparse_row(*found, index, out);
  if (const SparseValues* found = sparse_values()) return kernels.sparse_values_row(*found, index, out);
  kernels.dense_row(*dense(), index, out);
}

const QuantizedInputs& Inputs::quantized(const Cut& cut, const Kernels& kernels, ThreadPool& pool) {
  if (ready_ && cut == cut_) return quantized_;
  const size_t tokens = static_cast<size_t>(tokens_), blocks = static_cast<size_t>(cut.blocks());
  codes_.resize(std::max(codes_.size(), tokens * cut.padded() + 64));  // windows of sparse kernels read past the end
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

Inputs& Inputs::rounded(const InputRounding& rounding, int columns, ThreadPool& pool) {
  if (rounded_ready_ && rounding == rounding_) return *rounded_;
  const size_t count = static_cast<size_t>(tokens_) * columns;
  rounded_values_.resize(std::max(rounded_values_.size(), count));
  pool.run(tokens_, 4, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      round_inputs(rounding, values_ + t * columns, columns, rounded_values_.data() + t * columns);
  });
  if (!rounded_) rounded_ = std::make_unique<Inputs>();
  rounded_->set(rounded_values_.data(), tokens_);
  rounding_ = rounding;
  rounded_ready_ = true;
  return *rounded_;
}

namespace {

void multiply_span(const Product& product, const Inputs& inputs, const QuantizedInputs* quantized, Span span,
                   const Kernels& kernels) {
  const Matrix& matrix = *product.matrix;
  const float* values = inputs.values();
  const int tokens = inputs.tokens();
  if (const CodedMatrix* coded = matrix.coded()) {
    if (quantized != nullptr) return kernels.coded_integer(*coded, *quantized, span, product.out, product.stride);
    return kernels.coded_float(*coded, values, tokens, span, product.out, product.stride);
  }
  if (const SparseMatrix* sparse = matrix.sparse()) {
    if (quantized != nullptr) return kernels.sparse_integer(*sparse, *quantized, span, product.out, product.stride);
    return kernels.sparse_float(*sparse, values, tokens, span, product.out, product.stride);
  }
  if (const SparseValues* sparse = matrix.sparse_values())
    return kernels.sparse_values(*sparse, values, tokens, span, product.out, product.stride);
  kernels.dense(*matrix.dense(), values, tokens, span, product.out, product.stride);
}

constexpr int64_t kGrain = 4;  // tiles that a thread takes at the least; kernels take two at once

}  // namespace

void multiply(const std::vector<Product>& products, Inputs& inputs, bool integer, const Kernels& kernels, ThreadPool& pool) {
  size_t done = 0;
  while (done < products.size()) {
    const Matrix& own = *products[done].matrix;
    if (own.rounding().kind != InputRounding::Kind::none) {
      Inputs& rounded = inputs.rounded(own.rounding(), own.columns(), pool);
      pool.run(own.tiles(), kGrain, [&](int64_t first, int64_t end) {
        multiply_span(products[done], rounded, nullptr, Span{static_cast<int>(first), static_cast<int>(end)}, kernels);
      });
      ++done;
      continue;
    }
    // Products that read the same bytes go together; all do, unless a recipe gave them different groups.
    const Cut* cut = products[done].matrix->cut();
    const QuantizedInputs* quantized =
        integer && cut != nullptr ? &inputs.quantized(*cut, kernels, pool) : nullptr;
    size_t last = done + 1;
    int64_t tiles = products[done].matrix->tiles();
    for (; last < products.size(); ++last) {
      const Cut* other = products[last].matrix->cut();
      if (products[last].matrix->rounding().kind != InputRounding::Kind::none) break;
      const bool same = integer && other != nullptr ? quantized != nullptr && *other == *cut : quantized == nullptr;
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
