"""What `frontier.py` and a peer's script hand each other: a job in; a folder of weights and `peer.json` out.

Imported by the scripts beside it, each in its peer's own environment, so it needs torch, numpy and safetensors alone.
The scripts are called peer_NAME.py because a script's own folder comes first in the import path.

Bits are counted in two ways:

    bits_per_weight         codes, scales, codebooks, and zero points where they differ at all, each as wide as it is;
                            group indices where groups are not of neighbours, at the least that they need
    stored_bits_per_weight  every tensor that the peer's own writer put into its files for the linears, with the words
                            that do not fill up, group indices and constant zero points; null where it wrote none

The first favours the peer and is the one that is compared.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


@dataclass(frozen=True)
class Job:
    """One compression that a peer is asked for."""

    model: Path  # what the peer reads; may be padded with zeros to widths that divide by its groups
    original: Path  # the model that counts: shapes, names, everything that is not quantized
    ids: Path  # .npy, int64 [windows, tokens]
    output: Path
    bits: int
    group_size: int
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Job:
        """The job whose file is the script's one argument."""
        content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        paths = {key: Path(content.pop(key)) for key in ("model", "original", "ids", "output")}
        torch.set_num_threads(int(content.pop("threads")))
        torch.manual_seed(0)
        return cls(**paths, **content)

    def windows(self) -> list[list[int]]:
        """The calibration tokens, a list a window."""
        return np.load(self.ids).tolist()


@dataclass(frozen=True)
class Outcome:
    """What a peer gives back: weights by their names in the original, and what they cost."""

    weights: Mapping[str, torch.Tensor]
    bits_per_weight: float
    scheme: str
    stored_bits_per_weight: float | None = None


def run(peer: Callable[[Job], Outcome], version: str) -> None:
    """Runs a peer's function on the job and writes the result."""
    job = Job.read()
    started = time.monotonic()
    outcome = peer(job)
    seconds = time.monotonic() - started
    write_folder(job, outcome.weights)
    summary = {
        "bits_per_weight": outcome.bits_per_weight, "stored_bits_per_weight": outcome.stored_bits_per_weight,
        "scheme": outcome.scheme, "seconds": round(seconds, 2), "version": version,
    }  # fmt: skip
    (job.output / "peer.json").write_text(json.dumps(summary), encoding="utf-8")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Name → [out, in] of the linears of the blocks: what everybody quantizes."""
    return {name: tuple(t.shape) for name, t in read_tensors(folder).items() if LINEAR.search(name)}  # type: ignore[misc]


def write_folder(job: Job, weights: Mapping[str, torch.Tensor]) -> None:
    """The original in float32 with `weights` in place of its own; padding is cut off."""
    tensors = {name: tensor.float() for name, tensor in read_tensors(job.original).items()}
    missing = {name for name in tensors if LINEAR.search(name)} - set(weights)
    if missing or not set(weights) <= set(tensors):
        sys.exit(f"error: weights missing: {sorted(missing)}; unknown: {sorted(set(weights) - set(tensors))}")
    for name, weight in weights.items():
        cut = weight.detach().float()[tuple(slice(0, size) for size in tensors[name].shape)]
        if cut.shape != tensors[name].shape or not torch.isfinite(cut).all():
            sys.exit(f"error: {name} is {tuple(cut.shape)}, wanted {tuple(tensors[name].shape)}, all of it finite")
        tensors[name] = cut.contiguous()
    job.output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, job.output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((job.original / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (job.output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    for file in TOKENIZER_FILES:
        if (job.original / file).exists():
            shutil.copyfile(job.original / file, job.output / file)


def pad_model(original: Path, output: Path, multiple: int) -> Path:
    """The same function with widths inside the MLP that `multiple` divides, or the original where they do already.

    Rows of zeros in gate and up, columns of zeros in down: silu(0) · 0 = 0.
    """
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    width = int(config["intermediate_size"])
    wide = math.ceil(width / multiple) * multiple
    if wide == width:
        return original
    tensors = read_tensors(original)
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = torch.nn.functional.pad(tensor, (0, 0, 0, wide - width))
        elif name.endswith("down_proj.weight"):
            tensors[name] = torch.nn.functional.pad(tensor, (0, wide - width))
    shutil.copytree(original, output, ignore=shutil.ignore_patterns("*.safetensors", "*.txt"))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config["intermediate_size"] = wide
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return output


def uniform_bits(job: Job, *, scale_bits: int, zero_bits: int) -> float:
    """Bits a weight of codes, and a scale and zero point a group, over the original's shapes; a last group may be
    short.
    """
    total, weights = 0, 0
    for rows, columns in linear_shapes(job.original).values():
        groups = math.ceil(columns / job.group_size)
        total += rows * columns * job.bits + rows * groups * (scale_bits + zero_bits)
        weights += rows * columns
    return total / weights


def stored_bits(job: Job, folder: Path) -> float:
    """Bits a weight of everything in a folder's files that is not in the original under the same name."""
    kept = set(read_tensors(job.original)) - set(linear_shapes(job.original))
    found = read_tensors(folder)
    size = sum(t.numel() * t.element_size() for name, t in found.items() if name not in kept and "lm_head" not in name)
    return 8 * size / sum(rows * columns for rows, columns in linear_shapes(job.original).values())


def unpack_words(words: torch.Tensor, bits: int, count: int, dim: int) -> torch.Tensor:
    """int64 codes of int32 words along `dim`, `count` of them, densely packed from the lowest bit on."""
    stream = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    single = (stream[..., None] >> torch.arange(32)) & 1
    single = single.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (single << torch.arange(bits)).sum(-1).movedim(-1, dim)


def gptq_weights(folder: Path, job: Job, *, zero_offset: int) -> tuple[dict[str, torch.Tensor], bool, float]:
    """Dequantized weights of a folder in the GPTQ format; whether any zero point differs from the others; and the bits
    a weight that group indices would cost at their least, where columns of a group are not neighbours.

    `zero_offset`: 1 for the format's first version, which stores zero points less one.
    """
    tensors = read_tensors(folder)
    weights: dict[str, torch.Tensor] = {}
    differ, index_bits, count = False, 0, 0
    for name, shape in linear_shapes(job.original).items():
        module = name.removesuffix(".weight")
        scale = tensors[f"{module}.scales"].float()
        index = tensors[f"{module}.g_idx"].long()
        columns, rows = len(index), scale.shape[1]
        codes = unpack_words(tensors[f"{module}.qweight"], job.bits, columns, 0)
        zeros = unpack_words(tensors[f"{module}.qzeros"], job.bits, rows, 1)
        count += math.prod(shape)
        if not torch.equal(index, torch.arange(columns) // job.group_size):
            index_bits += shape[1] * math.ceil(math.log2(scale.shape[0]))
        differ = differ or bool((zeros != zeros.flatten()[0]).any())
        zeros = (zeros + zero_offset) & (2**job.bits - 1) if zero_offset else zeros
        weights[name] = ((codes - zeros[index]) * scale[index]).T
    return weights, differ, index_bits / count
