// Values of 16 or 32 bits, laid out for the kernels: [tiles][columns][8 rows].
#pragma once

#include "cpu/threads.h"
#include "formats/matrix.h"
#include "formats/storage.h"

namespace fettle {

class Dense {
 public:
  // values: [rows][columns] of `type`. Throws std::invalid_argument for an empty weight.
  Dense(const void* values, Number type, int rows, int columns, ThreadPool& pool);

  const DenseMatrix& view() const { return view_; }
  size_t bytes() const { return values_.size(); }

 private:
  DenseMatrix view_;
  Storage values_;
};

}  // namespace fettle
