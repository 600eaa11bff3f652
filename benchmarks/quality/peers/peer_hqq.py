"""HQQ on each linear, without data as it always is; runs in HQQ's own environment."""

from __future__ import annotations

from importlib.metadata import version

import torch
from exchange import Job, Outcome, linear_shapes, read_tensors, run, uniform_bits
from hqq.core.quantize import Quantizer, hqq_base_quant_config


def compress(job: Job) -> Outcome:
    """Its base configuration, groups along a row; scales and zero points are float16, packed codes are counted too."""
    tensors = read_tensors(job.model)
    settings = hqq_base_quant_config(nbits=job.bits, group_size=job.group_size, axis=1)["weight_quant_params"]
    weights: dict[str, torch.Tensor] = {}
    stored, count = 0, 0
    for name, (rows, columns) in linear_shapes(job.original).items():
        codes, meta = Quantizer.quantize(tensors[name], device="cpu", compute_dtype=torch.float16, **settings)
        meta["scale"], meta["zero"] = meta["scale"].half(), meta["zero"].half()
        stored += sum(t.numel() * t.element_size() for t in (codes, meta["scale"], meta["zero"]))
        count += rows * columns
        exact = {**meta, "scale": meta["scale"].float(), "zero": meta["zero"].float(), "compute_dtype": torch.float32}
        weights[name] = Quantizer.dequantize(codes, exact)
    bits = uniform_bits(job, scale_bits=16, zero_bits=16)
    scheme = f"int{job.bits}, group {job.group_size}, asymmetric with float16 zero points"
    return Outcome(weights, bits, scheme, 8 * stored / count)


if __name__ == "__main__":
    run(compress, version("hqq"))
