// A weight of any format, and inputs that are quantized once for all matrices that read them.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "cpu/threads.h"
#include "formats/coded.h"
#include "formats/dense.h"
#include "ops/kernels.h"

namespace fettle {

class Matrix {
 public:
  explicit Matrix(Coded coded) : coded_(std::move(coded)) {}
  explicit Matrix(Dense dense) : dense_(std::move(dense)) {}

  const CodedMatrix* coded() const { return coded_ ? &coded_->view() : nullptr; }
  const DenseMatrix* dense() const { return dense_ ? &dense_->view() : nullptr; }
  int rows() const { return coded_ ? coded_->view().rows : dense_->view().rows; }
  int columns() const { return coded_ ? coded_->view().cut.columns : dense_->view().columns; }
  int tiles() const { return coded_ ? coded_->view().tiles : dense_->view().tiles; }
  size_t bytes() const { return coded_ ? coded_->bytes() : dense_->bytes(); }
  void row(const Kernels& kernels, int index, float* out) const;

 private:
  std::optional<Coded> coded_;
  std::optional<Dense> dense_;
};

// The inputs of some matrices: float32 [tokens][columns], and in bytes for each cut that was asked for.
class Inputs {
 public:
  void set(const float* values, int tokens) {
    values_ = values;
    tokens_ = tokens;
    ready_ = false;
  }
  const float* values() const { return values_; }
  int tokens() const { return tokens_; }
  const QuantizedInputs& quantized(const Cut& cut, const Kernels& kernels, ThreadPool& pool);

 private:
  const float* values_ = nullptr;
  int tokens_ = 0;
  bool ready_ = false;  // whether what is below belongs to values_
  Cut cut_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_, sums_;
  std::vector<int32_t> pairs_;
  QuantizedInputs quantized_;
};

// One product: out [tokens][stride] = inputs · matrixᵀ.
struct Product {
  const Matrix* matrix = nullptr;
  float* out = nullptr;
  int64_t stride = 0;
};

// Products of the same inputs side by side, as one parallel region. integer: coded matrices read bytes.
void multiply(const std::vector<Product>& products, Inputs& inputs, bool integer, const Kernels& kernels, ThreadPool& pool);

}  // namespace fettle
