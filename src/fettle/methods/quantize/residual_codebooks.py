"""Residual codebooks: one code for eight weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.ranges import NOT_FINITE
from fettle.methods.quantize.sweep import corrected, factorize
from fettle.methods.quantize.vector_sweep import (
    Refinement,
    StoredScales,
    as_tensor,
    factorize_eights,
    filled_up,
    sweep,
)  # fmt: skip
from fettle.tensors.scheme import SCALE_DTYPES
from fettle.tensors.vectors import VectorScheme, VectorTensor


@dataclass(frozen=True, kw_only=True)
class ResidualCodebooks:
    """Vector codes: one point of the lattice E8 for eight weights, chosen by the error of the outputs."""

    name: ClassVar[str] = "residual_codebooks"
    title: ClassVar[str] = "Residual codebooks on E8"
    source: ClassVar[str] = "after QuIP#, Tseng et al. 2024, https://arxiv.org/abs/2402.04396"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    bits: int = field(default=2, metadata={"help": "bits", "minimum": 1, "maximum": 4})
    group_size: int | None = field(default=None, metadata={"help": "columns that share a scale", "minimum": 8})
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32", "float8_e4m3fn"] = field(
        default="auto", metadata={"help": "type of the scales"}
    )
    damping: float = field(default=0.01, metadata={"help": "damping", "minimum": 0.0, "maximum": 1.0})
    correction: float = field(default=0.5, metadata={"help": "drift", "minimum": 0.0, "maximum": 1.0})
    refine_passes: int = field(default=2, metadata={"help": "passes", "minimum": 0, "maximum": 100})
    spread: float = field(default=1.0, metadata={"help": "spread", "minimum": 0.0, "maximum": 10})

    def needs(self) -> tuple[str, ...]:
        """The gram; the drift where it is corrected."""
        return ("gram", "drift") if self.correction > 0 else ("gram",)

    def validate(self) -> None:
        self.scheme("float32").validate()

    def scheme(self, dtype: str) -> VectorScheme:
        chosen = dtype if self.scale_dtype == "auto" else self.scale_dtype
        return VectorScheme(
            bits=self.bits,
            granularity="channel" if self.group_size is None else "group",
            group_size=self.group_size,
            scale_dtype=chosen if chosen in SCALE_DTYPES else "float32",
        )

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> VectorTensor:
        gram = statistics["gram"]
        scheme = self.scheme(dtype)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(NOT_FINITE)
        factor = factorize(gram, damping=self.damping, activation_order=False)
        drift = statistics.get("drift")
        if drift is not None and self.correction > 0:
            weight = corrected(weight, drift, factor, self.correction)
        eights = factorize_eights(gram, factor.damping)
        shape = (weight.shape[0], weight.shape[1])
        filled = filled_up(weight)
        width = scheme.group_size or filled.shape[1]
        groups = [filled[:, i : i + width] for i in range(0, filled.shape[1], width)]
        rms = torch.stack([g.square().mean(1).sqrt() for g in groups], 1)
        base = self.spread * rms / scheme.stages[0].energy ** 0.5
        scales = StoredScales(base.max() * 1.5, scheme)
        scale = scales.rounded(base)
        codes, cost = sweep(filled, scale, eights, scheme)
        tile = Refinement(filled, codes, scale, eights, scheme, scales)
        for _ in range(self.refine_passes):
            changed = tile.refit_scales_()
            changed |= tile.move_codes_()
            if not changed:
                break
        tile.refit_scales_()
        return as_tensor(tile.codes, tile.scale, shape, scheme, scales)
