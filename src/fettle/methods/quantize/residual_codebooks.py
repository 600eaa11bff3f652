"""Residual codebooks: one code for eight weights, a second for what it leaves, on tables that cost no byte.

Two papers brought vector codes to 2 bits: AQLM (Egiazarian et al. 2024, https://arxiv.org/abs/2401.06118), which learns
additive codebooks for each matrix, and QuIP# (Tseng et al. 2024, https://arxiv.org/abs/2402.04396), which takes points
of the lattice E8. This is QuIP#'s table and feedback, with AQLM's way of improving codes afterwards. Why that one:
AQLM's codebooks have to be stored. Two of 256 entries of eight numbers take 64 kbit, which is one bit a weight for a
matrix of 256 x 256; its best, of 65,536 entries, half a bit for one of 4096 x 4096. E8's points follow from a rule,
leave 0.09 of a normal weight's variance at 2 bits (scalar levels 0.118), and need a scale a row and nothing else.

    minimise tr((W - V)·H·(W - V)ᵀ),    V = scale · (entry + entry₂ / ratio) for every eight neighbours of a row

- The sweep (`vector_sweep.py`) takes eight columns at a time, with the feedback of a block LDL factor, and chooses each
  code by the error itself, where QuIP# takes the nearest entry in a space that a random rotation has made alike in
  all directions. Rotated models can be given all the same: nothing here looks at where a weight came from.
- Passes of coordinate descent over codes, and least squares for scales, follow; none raises the error.
- A tuner can then move the codes and scales of a whole block by the gradient of what it gives out, as both papers do
  (`learned_rounding.py` has the steps, `soft_vectors.py` the codes that move). It is off by default: on the embedded
  model it cost as long again and gained nothing (`docs/results.md`).
- Inputs that earlier blocks have moved are corrected as in `gptq.py`.

Cost: a pass is 32,768 · 8 multiply-adds for eight weights and 16 bits of code, about 6 µs a weight on one core; twice
in³/3 for the factors.
Memory: a few float32 matrices [out, in], two grams, 4 MB of scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.protocols import BlockView, Tuner
from fettle.methods.quantize.learned_rounding import RoundingTuner, learned
from fettle.methods.quantize.ranges import NOT_FINITE
from fettle.methods.quantize.soft_vectors import SoftVectors
from fettle.methods.quantize.sweep import corrected, factorize
from fettle.methods.quantize.sweep_fields import SweepFields
from fettle.methods.quantize.vector_sweep import (
    Refinement,
    StoredScales,
    VectorFactor,
    as_tensor,
    factorize_eights,
    filled_up,
    sweep,
)
from fettle.tensors.scheme import SCALE_DTYPES
from fettle.tensors.vectors import VectorScheme, VectorTensor

# Spread of the weights over that of the entries, by bits: where a normal weight loses least, and a little for feedback.
SPREAD = {1: 0.9, 2: 1.1, 3: 1.1, 4: 1.2}
OF_STEPS = ("batch_windows", "code_rate", "scale_rate")
HEADROOM = 2.0  # by how much a scale of eight bits can grow over its start


@dataclass(frozen=True, kw_only=True)
class ResidualCodebooks(SweepFields):
    """Vector codes: one or two points of the lattice E8 for eight weights, chosen by the error of the outputs."""

    name: ClassVar[str] = "residual_codebooks"
    title: ClassVar[str] = "Residual codebooks (E8)"
    source: ClassVar[str] = "after QuIP#, Tseng et al. 2024, https://arxiv.org/abs/2402.04396"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    bits: int = field(
        default=2,
        metadata={"help": "bits of a code by its eight weights; from 3 on two stages", "minimum": 1, "maximum": 4},
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "columns that share a scale, a multiple of 8; none for one scale a row", "minimum": 8},
    )
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32", "float8_e4m3fn"] = field(
        default="auto",
        metadata={
            "help": "type of the scales; auto is the model's own, float8_e4m3fn comes with one for the whole tensor"
        },
    )
    refine_passes: int = field(
        default=2,
        metadata={
            "help": "passes that refit scales and choose codes anew while the error falls",
            "minimum": 0,
            "maximum": 100,
        },
    )
    steps: int = field(
        default=0,
        metadata={
            "help": "gradient steps a block; 0 for none, as they measured no gain yet",
            "minimum": 0,
            "maximum": 100_000,
        },
    )
    batch_windows: int = field(default=8, metadata={"help": "windows a step", "minimum": 1})
    code_rate: float = field(
        default=0.25,
        metadata={"help": "how many steps of the lattice a weight can travel in all", "minimum": 0.0, "maximum": 16.0},
    )
    scale_rate: float = field(
        default=0.001, metadata={"help": "relative change of a scale in the first step", "minimum": 0.0, "maximum": 0.1}
    )

    def validate(self) -> None:
        """Checks that the fields fit together.

        Raises:
            RecipeError: groups that are no whole eights; what is about steps where there are none.
        """
        self.scheme("float32").validate()
        for found in fields(self):
            if self.steps == 0 and found.name in OF_STEPS and getattr(self, found.name) != found.default:
                raise RecipeError(
                    f"residual_codebooks: {found.name} is about gradient steps, and steps is 0; set steps: 48, or "
                    "leave it out"
                )

    def scheme(self, dtype: str) -> VectorScheme:
        """The scheme; `dtype` is the model's own, for scale_dtype "auto"."""
        chosen = dtype if self.scale_dtype == "auto" else self.scale_dtype
        return VectorScheme(
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=chosen if chosen in SCALE_DTYPES else "float32",
        )

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> VectorTensor:
        """Chooses codes for weight [out, in] with the gram [in, in] of its inputs."""
        gram = statistics["gram"]
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(NOT_FINITE)
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise NonFiniteError("the gram of this linear's inputs holds NaN or infinity; check the block before it")
        factor = factorize(gram, damping=self.damping, activation_order=False)
        drift = statistics.get("drift")
        if drift is not None and self.correction > 0:
            weight = corrected(weight, drift, factor, self.correction)
        eights = factorize_eights(gram, factor.damping)
        return vector_codes(weight, eights, self.scheme(dtype), passes=self.refine_passes)

    def tuner(self) -> Tuner[VectorTensor] | None:
        """What improves the codes of a block; None without steps."""
        if self.steps == 0:
            return None
        options = RoundingTuner(
            steps=self.steps,
            batch_windows=self.batch_windows,
            rounding_rate=self.code_rate,
            scale_rate=self.scale_rate,
        )
        return VectorTuner(options=options)


@dataclass(frozen=True, kw_only=True)
class VectorTuner:
    """Learned rounding's steps on vector codes."""

    most_weights: ClassVar[None] = None

    options: RoundingTuner

    def tune(
        self, start: Mapping[str, VectorTensor], weights: Mapping[str, Tensor], block: BlockView
    ) -> dict[str, VectorTensor]:
        """Codes and scales with no larger error than the start's on the windows held back; pure."""
        soft = {name: SoftVectors(start[name], weights[name]) for name in start}
        return learned(start, soft, block, self.options)


def vector_codes(weight: Tensor, factor: VectorFactor, scheme: VectorScheme, *, passes: int) -> VectorTensor:
    """Codes and scales of weight [out, in] with a small error on inputs with this factor's gram; pure.

    Raises:
        NonFiniteError: a scale beyond its type.
    """
    filled = filled_up(weight)
    width = min(scheme.group_size or filled.shape[1], filled.shape[1])
    groups = torch.split(filled, width, dim=1)
    spread = torch.stack([group.square().mean(1).sqrt() for group in groups], dim=1)
    start = SPREAD[scheme.bits] * spread / scheme.stages[0].energy ** 0.5
    scales = StoredScales.up_to(HEADROOM * start.max(), scheme)
    scale = scales.rounded(start)
    tile = Refinement(filled, sweep(filled, scale, factor, scheme), scale, factor, scheme, scales)
    for _ in range(passes):
        moved = tile.refit_scales_()
        if not (tile.move_codes_() or moved):
            break
    tile.refit_scales_()
    return as_tensor(tile.codes, tile.scale, (weight.shape[0], weight.shape[1]), scheme, scales)
