#include "bindings/arrays.h"
#include "ops/matmul.h"

namespace fettle {
namespace {

std::shared_ptr<Matrix> sparse_codes(const Bytes2& codes, const Bytes2& kept, int bits, int group, const Raw2& scales,
                                     const std::string& type, const std::vector<float>& levels, float gain, ThreadPool& pool) {
  StoredCodes stored;
  stored.rows = static_cast<int>(codes.shape(0));
  stored.columns = static_cast<int>(codes.shape(1));
  stored.bits = bits;
  stored.stream_bits = 8;
  stored.group = group;
  stored.streams = codes.data();
  stored.stream_bytes = codes.shape(1);
  stored.scale_type = number_named(type);
  require_number(scales, stored.scale_type, "scales");
  stored.scales = scales.data();
  stored.scale_rows = static_cast<int>(scales.shape(0));
  stored.levels = levels;
  stored.gain = gain;
  if (kept.shape(0) != codes.shape(0) || kept.shape(1) != codes.shape(1)) throw std::invalid_argument("a mask is as large as its codes");
  const int groups = group < 1 ? 0 : (stored.columns + std::min(group, stored.columns) - 1) / std::min(group, stored.columns);
  if (static_cast<int>(scales.shape(1)) != groups) throw std::invalid_argument("there are " + std::to_string(scales.shape(1)) + " scales a row for " + std::to_string(groups) + " groups");
  nb::gil_scoped_release release;
  return std::make_shared<Matrix>(SparseCodes(stored, kept.data(), pool));
}

std::shared_ptr<Matrix> sparse_numbers(const Raw2& values, const std::string& type, ThreadPool& pool) {
  const Number number = number_named(type);
  require_number(values, number, "values");
  nb::gil_scoped_release release;
  return std::make_shared<Matrix>(
      SparseNumbers(values.data(), number, static_cast<int>(values.shape(0)), static_cast<int>(values.shape(1)), pool));
}

void set_rounding(Matrix& matrix, const std::string& kind, int bits, float scale, float point) {
  InputRounding rounding;
  if (kind == "symmetric") rounding.kind = InputRounding::Kind::symmetric;
  if (kind == "asymmetric") rounding.kind = InputRounding::Kind::asymmetric;
  if (kind == "e4m3") rounding.kind = InputRounding::Kind::e4m3;
  if (rounding.kind == InputRounding::Kind::none) throw std::invalid_argument("inputs are rounded symmetric, asymmetric or e4m3, not \"" + kind + "\"");
  if (bits < 2 || bits > 8 || !(scale >= 0)) throw std::invalid_argument("inputs have 2 to 8 bits and a scale that is not negative");
  rounding.bits = bits;
  rounding.scale = scale;
  rounding.point = point;
  matrix.set_rounding(rounding);
}

}  // namespace

void bind_sparse(nb::module_& module) {
  module.def("sparse_codes", &sparse_codes, nb::arg("codes"), nb::arg("kept"), nb::arg("bits"), nb::arg("group"),
             nb::arg("scales"), nb::arg("scale_type"), nb::arg("levels"), nb::arg("gain"), nb::arg("pool"));
  module.def("set_rounding", &set_rounding, nb::arg("matrix"), nb::arg("kind"), nb::arg("bits"), nb::arg("scale"), nb::arg("point"));
  module.def("sparse_numbers", &sparse_numbers, nb::arg("values"), nb::arg("type"), nb::arg("pool"));
}

}  // namespace fettle
