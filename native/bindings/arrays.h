// Numpy arrays in and out of the data plane.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "formats/matrix.h"

namespace fettle {

namespace nb = nanobind;

using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes2 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints1 = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Raw2 = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, or 16-bit numbers as uint16

inline Number number_named(const std::string& name) {
  if (name == "float32") return Number::float32;
  if (name == "float16") return Number::float16;
  if (name == "bfloat16") return Number::bfloat16;
  throw std::invalid_argument("numbers are float32, float16 or bfloat16, not \"" + name + "\"");
}

inline void require_number(const Raw2& array, Number type, const char* what) {
  if (array.itemsize() != static_cast<size_t>(number_bytes(type)))
    throw std::invalid_argument(std::string(what) + " have " + std::to_string(array.itemsize()) + " bytes a number");
}

// A fresh float32 array [rows][columns] that Python owns.
inline nb::ndarray<nb::numpy, float, nb::ndim<2>> owned(float* memory, size_t rows, size_t columns) {
  nb::capsule owner(memory, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::ndarray<nb::numpy, float, nb::ndim<2>>(memory, {rows, columns}, owner);
}

void bind_matrices(nb::module_& module);
void bind_sparse(nb::module_& module);
void bind_decoders(nb::module_& module);
void bind_limits(nb::module_& module);

}  // namespace fettle
