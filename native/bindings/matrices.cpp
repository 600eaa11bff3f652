#include "bindings/arrays.h"
#include "ops/matmul.h"

namespace fettle {
namespace {

std::shared_ptr<Matrix> coded(const Bytes2& streams, int columns, int stream_bits, int bits, int group, const Raw2& scales, const std::string& type,
                              const std::vector<float>& levels, nb::object zero_codes, float gain, ThreadPool& pool) {
  StoredCodes stored;
  stored.rows = static_cast<int>(streams.shape(0));
  stored.columns = columns;
  stored.bits = bits;
  stored.stream_bits = stream_bits;
  stored.group = group;
  stored.streams = streams.data();
  stored.stream_bytes = streams.shape(1);
  stored.scale_type = number_named(type);
  require_number(scales, stored.scale_type, "scales");
  stored.scales = scales.data();
  stored.scale_rows = static_cast<int>(scales.shape(0));
  stored.levels = levels;
  stored.gain = gain;
  const size_t groups = group < 1 ? 0 : static_cast<size_t>((columns + std::min(group, columns) - 1) / std::min(group, columns));
  if (scales.shape(1) != groups) throw std::invalid_argument("there are " + std::to_string(scales.shape(1)) + " scales a row for " + std::to_string(groups) + " groups");
  Bytes2 zeros;
  if (!zero_codes.is_none()) {
    zeros = nb::cast<Bytes2>(zero_codes);
    if (zeros.shape(0) != scales.shape(0) || zeros.shape(1) != groups) throw std::invalid_argument("zero points are as many as scales");
    stored.zero_codes = zeros.data();
  }
  nb::gil_scoped_release release;
  return std::make_shared<Matrix>(Coded(stored, pool));
}

std::shared_ptr<Matrix> dense(const Raw2& values, const std::string& type, ThreadPool& pool) {
  const Number number = number_named(type);
  require_number(values, number, "values");
  nb::gil_scoped_release release;
  return std::make_shared<Matrix>(
      Dense(values.data(), number, static_cast<int>(values.shape(0)), static_cast<int>(values.shape(1)), pool));
}

nb::object product(const Matrix& matrix, const Floats2& inputs, ThreadPool& pool, bool integer, const std::string& kernels) {
  if (static_cast<int>(inputs.shape(1)) != matrix.columns()) throw std::invalid_argument("inputs have " + std::to_string(inputs.shape(1)) + " columns, the weight " + std::to_string(matrix.columns()));
  const size_t tokens = inputs.shape(0), rows = static_cast<size_t>(matrix.rows());
  const Kernels& table = find_kernels(kernels);
  float* out = new float[std::max<size_t>(tokens * rows, 1)];
  {
    nb::gil_scoped_release release;
    Inputs read;
    read.set(inputs.data(), static_cast<int>(tokens));
    if (tokens > 0) multiply({{&matrix, out, matrix.rows()}}, read, integer, table, pool);
  }
  return nb::cast(owned(out, tokens, rows));
}

nb::object row_of(const Matrix& matrix, int index, const std::string& kernels) {
  if (index < 0 || index >= matrix.rows()) throw std::invalid_argument("the weight has no row " + std::to_string(index));
  float* out = new float[static_cast<size_t>(matrix.columns())];
  matrix.row(find_kernels(kernels), index, out);
  return nb::cast(owned(out, 1, static_cast<size_t>(matrix.columns())));
}

}  // namespace

void bind_matrices(nb::module_& module) {
  nb::class_<Matrix>(module, "Matrix")
      .def_prop_ro("rows", &Matrix::rows)
      .def_prop_ro("columns", &Matrix::columns)
      .def_prop_ro("nbytes", &Matrix::bytes)
      .def_prop_ro("block", [](const Matrix& m) { return m.cut() != nullptr ? m.cut()->block : 0; })
      .def("multiply", &product, nb::arg("inputs"), nb::arg("pool"), nb::arg("integer"), nb::arg("kernels") = "")
      .def("row", &row_of, nb::arg("index"), nb::arg("kernels") = "");
  module.def("coded", &coded, nb::arg("streams"), nb::arg("columns"), nb::arg("stream_bits"), nb::arg("bits"), nb::arg("group"), nb::arg("scales"),
             nb::arg("scale_type"), nb::arg("levels"), nb::arg("zero_codes").none(), nb::arg("gain"), nb::arg("pool"));
  module.def("dense", &dense, nb::arg("values"), nb::arg("type"), nb::arg("pool"));
  module.def("has_units", &has_units, nb::arg("levels"), nb::arg("bits"));
}

}  // namespace fettle
