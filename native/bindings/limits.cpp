// What this machine can do at best, measured: what the decoder's speed is held against.

#include <algorithm>
#include <chrono>
#include <cstring>

#include "bindings/arrays.h"
#include "cpu/threads.h"
#include "formats/storage.h"
#include "ops/kernels.h"

namespace fettle {
namespace {

double seconds_of(const std::chrono::steady_clock::time_point& start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes a second that all threads read together from memory, the best of `repeats`.
double memory_bandwidth(ThreadPool& pool, int64_t bytes, int repeats, const std::string& name) {
  constexpr int64_t kPiece = 1 << 16;
  const Kernels& kernels = find_kernels(name);
  if (bytes < kPiece || repeats < 1) throw std::invalid_argument("read at least 65536 bytes, at least once");
  nb::gil_scoped_release release;
  const int64_t pieces = bytes / kPiece;
  Storage memory(static_cast<size_t>(pieces * kPiece));
  std::memset(memory.data(), 1, memory.size());  // pages that nobody wrote are all the same one
  double best = 0;
  std::atomic<uint64_t> seen{0};
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(pieces, 8, [&](int64_t first, int64_t last) {
      seen.fetch_xor(kernels.read_bytes(memory.data() + first * kPiece, (last - first) * kPiece));
    });
    best = std::max(best, static_cast<double>(pieces * kPiece) / seconds_of(start));
  }
  return best;
}

// Operations a second (a multiplication and an addition are two) of products of bytes on all threads.
double integer_peak(ThreadPool& pool, int repeats, const std::string& name) {
  const Kernels& kernels = find_kernels(name);
  if (repeats < 1) throw std::invalid_argument("measure at least once");
  nb::gil_scoped_release release;
  const int64_t rounds = 1 << 18;
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    std::atomic<int64_t> done{0};
    const auto start = std::chrono::steady_clock::now();
    pool.run(8 * pool.threads(), 1, [&](int64_t first, int64_t last) {
      for (; first < last; ++first) done.fetch_add(kernels.multiply_adds(rounds));
    });
    best = std::max(best, 2 * static_cast<double>(done.load()) / seconds_of(start));
  }
  return best;
}

}  // namespace

void bind_limits(nb::module_& module) {
  module.def("memory_bandwidth", &memory_bandwidth, nb::arg("pool"), nb::arg("bytes"), nb::arg("repeats"), nb::arg("kernels") = "");
  module.def("integer_peak", &integer_peak, nb::arg("pool"), nb::arg("repeats"), nb::arg("kernels") = "");
}

}  // namespace fettle
