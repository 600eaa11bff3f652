"""GPTQ: round one column after another, and let the columns still to come make up for the error so far.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, 2022, https://arxiv.org/abs/2210.17323. For a weight W and the gram H of its
inputs it lowers the error of the outputs, tr((W - V)·H·(W - V)ᵀ), over values V that codes can stand for.

The paper removes one column at a time from H⁻¹, through the Cholesky factor of the inverse. Ours is the same recursion
without an inverse. With H = L·Lᵀ, L lower triangular, columns are taken from the last to the first:

    v_k = nearest(w_k + Σ_{j > k} (w_j - v_j)·L[j, k] / L[k, k])

gives the same codes (the equivalence is theorem 6 of QuIP, Chee et al. 2023, https://arxiv.org/abs/2307.13304; a test
compares with the naive update by an explicit inverse, column by column). It takes one factorization in place of two and
an inversion, loses less to rounding, and holds one matrix [in, in] beside the gram.

    weights   to come: w  w  w │ block: w  w │ done: v  v      a block first takes up all errors after it, in one
    errors             0  0  0 │        0  0 │       e  e      product, then goes column by column, all rows at once

The columns are arranged so that the last one is the first to go: the strongest input in activation order (while there
is most freedom to make up for it), else the leftmost. Four choices are ours:

- Scales. In activation order they come from the original weight's groups (static groups), so that nothing of the order
  has to be stored. Without it, a group's scale comes from the weights as earlier columns have changed them (the paper).
- `clip: search` takes for each group the range with the least error, each column weighted by what its error costs after
  later columns have made up for what they can (`sweep.py`). That wins where inputs are little correlated and loses
  where later columns move far; `best` solves with both ranges and keeps the better one row by row.
- `refine_passes` afterwards refit scales and move codes while the error falls (`refine.py`).
- `correction`: blocks before this one are compressed already, so its inputs X drifted from the original X°. Where the
  walk collects the statistic "drift", D = (X° - X)ᵀX, the weight to be approached is W + c·W·D·H⁻¹, which with c = 1
  gives the original outputs back in the least-squares sense (GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692).
  c = 1/2 measured as good as 1 at 4 bits and better below: the drift is partly noise of the calibration text.

Plain paper: clip none, refine_passes 0, correction 0. Measured on stories260K (asymmetric, group 32, KL over that of
round to nearest, 4 / 3 / 2 bits): plain 0.64 / 0.61 / 0.72; with clip and refinement 0.55 / 0.46 / 0.41; and with the
correction as well 0.44 / 0.35 / 0.28.

Dead columns (never driven) have no part in H but the damping: they are rounded to nearest and disturb nobody.

Cost: in³/3 for the factor, out·in²/2 multiply-adds a sweep (`best` makes two), out·in² a refining pass.
Memory: one float32 [in, in], the codes, and tiles of 512 rows or 2^22 weights, whichever is more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.ranges import FUSED_MAXIMUM, in_tensor_units
from fettle.methods.quantize.refine import refine
from fettle.methods.quantize.sweep import better_rows, corrected, factorize, solve
from fettle.methods.quantize.sweep_fields import SweepFields
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Gptq(SweepFields, GridFields):
    """GPTQ: rounds column after column, and later columns make up for the error of earlier ones."""

    name: ClassVar[str] = "gptq"
    title: ClassVar[str] = "GPTQ"
    source: ClassVar[str] = "Frantar et al. 2022, https://arxiv.org/abs/2210.17323"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    activation_order: bool = field(
        default=True, metadata={"help": "strongest inputs first, with scales fixed beforehand"}
    )
    clip: Literal["none", "search", "best"] = field(
        default="best",
        metadata={
            "help": "the full range of each group (the paper), a searched one, or the better of both for each row"
        },
    )
    refine_passes: int = field(
        default=2,
        metadata={
            "help": "passes that refit scales and move codes while the error falls; 0 is the paper",
            "minimum": 0,
            "maximum": 100,
        },
    )

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """Chooses codes for weight [out, in] with the gram [in, in] of its inputs."""
        options = GptqOptions(
            damping=self.damping,
            activation_order=self.activation_order,
            clip=self.clip,
            refine_passes=self.refine_passes,
            correction=self.correction,
        )
        scheme = self.scheme(dtype)

        def solve(weight: Tensor) -> QuantizedTensor:
            return gptq(weight, statistics["gram"], scheme, options, drift=statistics.get("drift"))

        return in_tensor_units(weight, scheme, solve, statistics.get(FUSED_MAXIMUM))


@dataclass(frozen=True, kw_only=True)
class GptqOptions:
    """What `gptq` may do; the defaults are the plain paper with activation order."""

    damping: float = 0.01
    activation_order: bool = True
    clip: str = "none"
    refine_passes: int = 0
    correction: float = 0.0


def gptq(
    weight: Tensor, gram: Tensor, scheme: Scheme, options: GptqOptions | None = None, drift: Tensor | None = None
) -> QuantizedTensor:
    """Codes of weight [out, in] that keep its outputs on inputs with this gram [in, in]; pure.

    Args:
        weight: [out, in], any floating type.
        gram: float32 [in, in], symmetric.
        scheme: any grid and granularity.
        options: see `GptqOptions`.
        drift: float32 [in, in], (original inputs - inputs)ᵀ·inputs, for options.correction; None for no drift.

    Raises:
        NonFiniteError: NaN or infinity in the weight or the gram, or a scale beyond its type.
    """
    options = options or GptqOptions()
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise NonFiniteError("the gram of this linear's inputs holds NaN or infinity; check the block before it")
    factor = factorize(gram, damping=options.damping, activation_order=options.activation_order)
    if drift is not None and options.correction > 0:
        weight = corrected(weight, drift, factor, options.correction)
    found = [
        solve(weight, factor, scheme, clip=clip, activation_order=options.activation_order)
        for clip in (("none", "search") if options.clip == "best" else (options.clip,))
    ]
    damping = factor.damping
    del factor
    quantized = found[0].quantized if len(found) == 1 else better_rows(*found)
    del found
    return refine(quantized, weight, gram, damping=damping, passes=options.refine_passes)
