// A weight of any format, and inputs that are quantized once for all matrices that read them.
#pragma once

#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/threads.h"
#include "formats/coded.h"
#include "formats/dense.h"
#include "formats/sparse.h"
#include "ops/kernels.h"
#include "ops/round_inputs.h"

namespace fettle {

class Matrix {
 public:
  explicit Matrix(Coded coded) : stored_(std::move(coded)) {}
  explicit Matrix(Dense dense) : stored_(std::move(dense)) {}
  explicit Matrix(SparseCodes codes) : stored_(std::move(codes)) {}
  explicit Matrix(SparseNumbers numbers) : stored_(std::move(numbers)) {}

  const CodedMatrix* coded() const { return view_of<Coded>(); }
  const DenseMatrix* dense() const { return view_of<Dense>(); }
  const SparseMatrix* sparse() const { return view_of<SparseCodes>(); }
  const SparseValues* sparse_values() const { return view_of<SparseNumbers>(); }
  const Cut* cut() const;  // of codes, which can read inputs in bytes; null for numbers
  int rows() const;
  int columns() const;
  int tiles() const;
  size_t bytes() const;
  void row(const Kernels& kernels, int index, float* out) const;

  // How the checkpoint quantizes what this reads; products then read the values of those codes in float32.
  const InputRounding& rounding() const { return rounding_; }
  void set_rounding(const InputRounding& rounding) { rounding_ = rounding; }

 private:
  template <typename T>
  auto view_of() const -> decltype(&std::declval<const T&>().view()) {
    const T* found = std::get_if<T>(&stored_);
    return found != nullptr ? &found->view() : nullptr;
  }

  std::variant<Coded, Dense, SparseCodes, SparseNumbers> stored_;
  InputRounding rounding_;
};

// The inputs of some matrices: float32 [tokens][columns], and in bytes for each cut that was asked for.
class Inputs {
 public:
  void set(const float* values, int tokens) {
    values_ = values;
    tokens_ = tokens;
    ready_ = rounded_ready_ = false;
  }
  const float* values() const { return values_; }
  int tokens() const { return tokens_; }
  const QuantizedInputs& quantized(const Cut& cut, const Kernels& kernels, ThreadPool& pool);
  Inputs& rounded(const InputRounding& rounding, int columns, ThreadPool& pool);  // as a checkpoint quantizes them

 private:
  const float* values_ = nullptr;
  int tokens_ = 0;
  bool ready_ = false;  // whether what is below belongs to values_
  Cut cut_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_, sums_;
  std::vector<int32_t> pairs_;
  QuantizedInputs quantized_;
  bool rounded_ready_ = false;
  InputRounding rounding_;
  std::vector<float> rounded_values_;
  std::unique_ptr<Inputs> rounded_;
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
