"""Rotation: the same model in other coordinates, whose weights and activations have no outliers left.

    x → x·R          the residual stream: embeddings and what writes to it times R, what reads it times Rᵀ        (R1)
    v → v·R_b        values of every head of block b, and the columns of the output projection that read them      (R2)

Papers: QuaRot (Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, section 4, stage 1) and SpinQuant (Liu et al.
2024, https://arxiv.org/abs/2405.16406, section 3), whose names R1 and R2 are. R is a randomized Hadamard matrix of any
width (`tensors/orthogonal.py`): a channel a hundred times larger than the others, which would dictate the scale of its
group or token, is shared out among all. RMSNorm commutes with R once its weight is folded into what reads it.

It chooses no codes. It is the first step of a recipe and the base as rotated is what all other steps see, so any method
on any grid, with statistics, rescaling, the drift and a block's objective, works on it as on any other base
(`models/rotated.py` does the folding, as a block is read).

Ours differs: LayerNorm models (GPT-2, GPT-Neo, GPT-NeoX) are rotated by an R that leaves the vector of ones where it
is, so that their norms stay LayerNorms and no mean has to be folded into what writes. Query heads that share a
key-value head need nothing: a block has one R_b. All is offline and costs nothing at run time. Rotations that would
have to be computed at run time (the inputs of the down projection, keys in a cache: R4 and R3) are not there, nor
learned ones.

Cost: n·log n additions a row of each matrix, once. Tied embeddings are untied, since the final norm is folded into the
head alone: the written model has a head of its own, which plan and ledger count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fettle.errors import RecipeError
from fettle.tensors.orthogonal import Orthogonal, randomized

_STREAMS = 2**20  # seeds stand this far apart, so that no block of one is a block of the next


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotates the residual stream and the values of every head, before any other step looks at the model."""

    name: ClassVar[str] = "rotation"
    title: ClassVar[str] = "Randomized Hadamard rotation, folded into the weights"
    source: ClassVar[str] = "Ashkboos et al. 2024, QuaRot, https://arxiv.org/abs/2404.00456"
    statistics: ClassVar[tuple[str, ...]] = ()
    objective: ClassVar[str] = "nothing"
    switch: ClassVar[str] = "rotate"

    residual: bool = field(default=True, metadata={"help": "rotate the residual stream, between all blocks"})
    heads: bool = field(default=True, metadata={"help": "rotate each head's values, before the output projection"})
    seed: int = field(default=0, metadata={"help": "which signs are drawn", "minimum": 0, "maximum": 2**32 - 1})

    def validate(self) -> None:
        """Something must be rotated."""
        if not (self.residual or self.heads):
            raise RecipeError("rotation: residual=false and heads=false rotate nothing; leave the step out")

    def residual_map(self, width: int, *, centred: bool) -> Orthogonal | None:
        """R of the residual stream; None where it stays.

        Args:
            width: how many channels the residual stream has.
            centred: whether R has to leave the vector of ones where it is, for LayerNorm.

        Raises:
            RecipeError: an odd width, for which there is no Hadamard matrix.
        """
        if not self.residual:
            return None
        found = randomized(width, torch.Generator().manual_seed(self.seed * _STREAMS), centred=centred)
        if found.order == 1:
            raise RecipeError(
                f"rotation: the residual stream has {width} channels, and no Hadamard matrix divides an odd number; "
                "use residual: false (--no-rotate-residual), or leave the rotation out"
            )
        return found

    def head_map(self, head_dim: int, block: int) -> Orthogonal | None:
        """R of the values of every head of one block; None where they stay, as with an odd head size."""
        if not self.heads:
            return None
        found = randomized(head_dim, torch.Generator().manual_seed(self.seed * _STREAMS + block + 1))
        return found if found.order > 1 else None
