// fettle._native: the data plane as Python sees it. src/fettle/_native.pyi says the types.

#include "bindings/arrays.h"
#include "cpu/features.h"
#include "cpu/threads.h"

namespace fettle {

NB_MODULE(_native, module) {
  module.doc() = "fettle's data plane: matrices of codes and the decoder's step, in C++";
  module.def("features", [] {
    const Features found = features();
    nb::dict told;
    told["instructions"] = best_instructions();
    told["avx2"] = found.avx2;
    told["avx512_vnni"] = found.avx512_vnni;
    told["neon_dot"] = found.neon_dot;
    told["available"] = available_instructions();
    return told;
  });
  nb::class_<ThreadPool>(module, "Pool")
      .def(
          "__init__",
          [](ThreadPool* self, int threads, bool pinned) {
            if (threads < 1 || threads > 1024) throw std::invalid_argument("threads are 1 to 1024");
            new (self) ThreadPool(threads, pinned);
          },
          nb::arg("threads"), nb::arg("pinned") = false)
      .def_prop_ro("threads", &ThreadPool::threads);
  bind_matrices(module);
  bind_sparse(module);
  bind_decoders(module);
  bind_limits(module);
}

}  // namespace fettle
