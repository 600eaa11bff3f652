"""A compressed folder without methods and pipeline: nearest codes for plain min-max scales, written with the writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fettle.models.anatomy import Anatomy, Linear, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import quantization_config, read_weight
from fettle.models.writer import copy_side_files, write_json, write_shard
from fettle.tensors.grid import uniform
from fettle.tensors.quantized import QuantizedTensor, quantize
from fettle.tensors.scheme import Granularity, Scheme


def make_scheme(
    bits: int = 8,
    granularity: Granularity = "channel",
    group_size: int | None = None,
    *,
    zero_point: bool = False,
    scale_dtype: str = "float32",
) -> Scheme:
    return Scheme(
        grid=uniform(bits),
        granularity=granularity,
        group_size=group_size,
        zero_point=zero_point,
        scale_dtype=scale_dtype,
    )


def nearest(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Round to nearest with a scale from the largest value, or from the range of a group with a zero point."""
    rows, groups = scheme.scale_shape((weight.shape[0], weight.shape[1]))
    if scheme.granularity == "tensor":
        parts = [weight.reshape(1, -1)]
    else:
        parts = list(weight.split(-(-weight.shape[1] // groups) if scheme.group_size is None else scheme.group_size, 1))
    low = torch.stack([p.amin(1).clamp(max=0) for p in parts], 1)
    high = torch.stack([p.amax(1).clamp(min=0) for p in parts], 1)  # [rows, groups]
    assert low.shape == (rows, groups)
    bits = scheme.grid.bits
    dtype = getattr(torch, scheme.scale_dtype)
    if not scheme.zero_point:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
        return quantize(weight, scale.to(dtype), None, scheme)
    scale = ((high - low) / (2**bits - 1)).to(dtype)
    zero_point = (-low / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return quantize(weight, scale, zero_point, scheme)


def write_compressed(
    source: Path, target: Path, choose: Callable[[Linear, Anatomy], Scheme | None], *, storage: str = "pack-quantized"
) -> dict[str, QuantizedTensor]:
    """Writes `source` into `target` with the linears for which `choose` gives a scheme stored as codes."""
    checkpoint = Checkpoint.open(source)
    anatomy = read_anatomy(checkpoint)
    tensors, codes = {}, {}
    outside = [x for x in (anatomy.embedding, anatomy.head) if x is not None]
    for linear in (*anatomy.linears(), *(outside[:1] if anatomy.tied else outside)):
        scheme = choose(linear, anatomy)
        if scheme is not None:
            codes[linear.name] = nearest(read_weight(checkpoint, linear), scheme)
            tensors.update({f"{linear.name}.{k}": v for k, v in codes[linear.name].to_state(storage).items()})
    for name in checkpoint.entries:
        if name.removesuffix(".weight") not in codes:
            tensors[name] = checkpoint.read(name)
    write_shard(target, "model.safetensors", tensors, {"format": "pt"})
    config = dict(checkpoint.config)
    config["quantization_config"] = quantization_config({n: q.scheme for n, q in codes.items()}, anatomy, storage)
    write_json(target / "config.json", config)
    copy_side_files(source, target)
    return codes
