"""llama.cpp's products through its own ggml libraries: one weight in several copies, times one token or many.

The weights lie where llama.cpp puts them on an AVX2 processor: types of 4 bits in the extra buffer of its CPU device
that repacks their blocks, the others in its plain one. Only products are timed, no attention, no norms.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {
    "Q4_0": (2, 32, 18),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q4_K": (12, 256, 144),
    "IQ3_S": (21, 256, 110),
    "TQ2_0": (35, 256, 66),
}
REPACKED = ("Q4_0", "Q4_K")
FLOAT32 = 0


class _Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The libraries in one folder, and a CPU backend with so many threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self.backend = self._call(self.cpu, "ggml_backend_cpu_init")
        self._call(self.cpu, "ggml_backend_cpu_set_n_threads", self.backend, ctypes.c_int(threads))

    def _call(self, library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
        function = getattr(library, name)
        function.restype = ctypes.c_void_p
        return function(*(ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments))

    def _context(self) -> Any:
        return self._call(self.base, "ggml_init", _Parameters(1 << 24, None, True))

    def _allocate(self, context: Any, kind: Any) -> Any:
        return self._call(self.base, "ggml_backend_alloc_ctx_tensors_from_buft", context, kind)

    def _weight_kinds(self) -> list[Any]:
        """Buffer types for weights, llama.cpp's order: the repacking ones first."""
        registry = self._call(self.cpu, "ggml_backend_cpu_reg")
        name = ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")
        address = self._call(self.base, "ggml_backend_reg_get_proc_address", registry, name)
        device = self._call(self.base, "ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))
        plain = self._call(self.base, "ggml_backend_cpu_buffer_type")
        if not address:
            return [plain]
        found = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        extra, index = [], 0
        while found and found[index]:
            extra.append(found[index])
            index += 1
        return [*extra, plain]

    def graph(self, kind: str, rows: int, columns: int, copies: int, tokens: int) -> Any:
        """A graph of `copies` products of random weights with the same inputs, ready to `run`."""
        number, block, block_bytes = TYPES[kind]
        weights, work = self._context(), self._context()
        tensor = ("ggml_new_tensor_2d", ctypes.c_int(number), ctypes.c_int64(columns), ctypes.c_int64(rows))
        made = [self._call(self.base, tensor[0], weights, *tensor[1:]) for _ in range(copies)]
        kinds = self._weight_kinds()
        self._allocate(weights, kinds[0] if kind in REPACKED else kinds[-1])
        blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // block, block_bytes), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)  # a scale that is a number
        blocks[:, -2:] = blocks[:, :2] if kind in ("Q2_K", "TQ2_0") else blocks[:, -2:]
        data = np.ascontiguousarray(blocks)
        for each in made:
            pointer, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
            self._call(self.base, "ggml_backend_tensor_set", each, pointer, ctypes.c_size_t(0), size)
        inputs = self._call(
            self.base,
            "ggml_new_tensor_2d",
            work,
            ctypes.c_int(FLOAT32),
            ctypes.c_int64(columns),
            ctypes.c_int64(tokens),
        )
        graph = self._call(self.base, "ggml_new_graph", work)
        for each in made:
            self._call(
                self.base, "ggml_build_forward_expand", graph, self._call(self.base, "ggml_mul_mat", work, each, inputs)
            )
        self._allocate(work, kinds[-1])
        values = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
        pointer, size = ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes)
        self._call(self.base, "ggml_backend_tensor_set", inputs, pointer, ctypes.c_size_t(0), size)
        return graph

    def run(self, graph: Any) -> None:
        """Computes a graph."""
        self._call(self.base, "ggml_backend_graph_compute", self.backend, graph)
