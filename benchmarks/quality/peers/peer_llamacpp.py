"""llama.cpp's types with an importance matrix, through its own ggml library; runs in an environment with gguf.

`ggml_quantize_chunk` writes a matrix's blocks and the gguf package reads them back: what `llama-quantize` stores of it,
without the rest of a GGUF file. The library, libggml-base, is llama-cpp-python's, or what GGML_LIBRARY names. The
importance of a column is the mean square of what the linear reads over the calibration tokens, as in `llama-imatrix`.

A name that ends in _M is llama.cpp's mix for the architecture (`llama_tensor_get_type`), and so is Q2_K; the other
types are taken for every linear alike (`--pure`). A row that blocks of 256 do not divide is padded with zeros that
matter nothing, and costs its share of the last block; llama.cpp itself would take a larger type there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from exchange import Job, Outcome, linear_shapes, read_tensors, run
from transformers import AutoModelForCausalLM


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's `use_more_bits`."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def type_of(mix: str, name: str, layers: int) -> str:
    """The type of one linear in a mix of llama.cpp, for a dense llama with fewer than four queries a key."""
    layer = int(re.search(r"\.layers\.(\d+)\.", name)[1])  # type: ignore[index]
    role = name.split(".")[-2].removesuffix("_proj")
    if mix == "Q4_K_M":
        return "Q6_K" if role in ("v", "down") and more_bits(layer, layers) else "Q4_K"
    if mix == "Q3_K_M":
        first = 2 if role == "v" else layers // 16
        higher = "Q5_K" if role in ("v", "down") and layer < first else "Q4_K"
        return higher if role in ("v", "down", "o") else "Q3_K"
    if mix == "Q2_K":
        return "Q3_K" if role in ("v", "down", "o") else "Q2_K"
    return mix.removesuffix("_pure")


def library() -> ctypes.CDLL:
    """libggml-base with the one function that is called."""
    path = os.environ.get("GGML_LIBRARY")
    if path is None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            raise SystemExit("error: no libggml-base: install llama-cpp-python, or set GGML_LIBRARY to its path")
        path = str(Path(found.origin).parent / "lib" / "libggml-base.so")
    loaded = ctypes.CDLL(path)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return loaded


def importance(job: Job) -> dict[str, np.ndarray]:
    """Name of a linear → float32 [in], mean square of its inputs."""
    model = AutoModelForCausalLM.from_pretrained(job.original, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> None:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            total = inputs[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + total if name in sums else total

        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(add)

    for name in linear_shapes(job.original):
        watch(name)
    windows = job.windows()
    with torch.no_grad():
        for row in windows:
            model.model(torch.tensor([row]))
    return {name: (total / sum(map(len, windows))).float().numpy() for name, total in sums.items()}


def quantized(lib: ctypes.CDLL, weight: np.ndarray, columns: np.ndarray, kind: str) -> tuple[np.ndarray, float]:
    """The dequantized matrix, and bits a weight of its type."""
    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    padding = -weight.shape[1] % block
    wide = np.ascontiguousarray(np.pad(weight, ((0, 0), (0, padding))))
    columns = np.ascontiguousarray(np.pad(columns, (0, padding)))
    out = np.zeros((wide.shape[0], wide.shape[1] // block * size), dtype=np.uint8)
    written = lib.ggml_quantize_chunk(
        int(qtype), wide.ctypes.data, out.ctypes.data, 0, wide.shape[0], wide.shape[1], columns.ctypes.data
    )
    if written != out.nbytes:
        raise SystemExit(f"error: {kind} wrote {written} bytes where {out.nbytes} were expected")
    return gguf.quants.dequantize(out, qtype)[:, : weight.shape[1]], 8 * size / block


def compress(job: Job) -> Outcome:
    """Every linear in the type that the job's option `type` gives it."""
    shapes = linear_shapes(job.original)
    layers = 1 + max(int(re.search(r"\.layers\.(\d+)\.", name)[1]) for name in shapes)  # type: ignore[index]
    types = {name: type_of(job.options["type"], name, layers) for name in shapes}
    for name, kind in types.items():
        if shapes[name][1] < gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]:
            raise SystemExit(f"error: {kind} is for blocks wider than the {shapes[name][1]} columns of {name}")
    lib, tensors, columns = library(), read_tensors(job.original), importance(job)
    weights: dict[str, torch.Tensor] = {}
    total, count, kinds = 0.0, 0, set()
    for name, (rows, width) in shapes.items():
        kind = types[name]
        value, bits = quantized(lib, tensors[name].float().numpy(), columns[name], kind)
        weights[name] = torch.from_numpy(value.copy())
        total, count, kinds = total + bits * rows * width, count + rows * width, kinds | {kind}
    return Outcome(weights, total / count, f"{' and '.join(sorted(kinds))}, importance matrix")


if __name__ == "__main__":
    installed = importlib.util.find_spec("llama_cpp") is not None
    run(compress, version("llama-cpp-python") if installed else os.environ.get("GGML_VERSION", "of GGML_LIBRARY"))
