"""The statistic "gradient": how sharply the model's own predictions depend on each weight of a block.

    g_ij = mean over pieces of 256 tokens of |Σ ∂loss/∂y_ti · x_tj|        [out, in] of each linear

The original runs once forward and once backward over at most 4,096 tokens of the calibration windows, on labels that it
draws itself (`diagnose/original.py`, whose sensitivities start from the same gradients); then each block gives its
linears' gradients when the walk comes to it. A resumed run does it again: nothing depends on chance or threads.

Memory: the hidden states of the sample, twice, at every block; one block's gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.data.windows import Windows
from fettle.diagnose.estimates import Activations
from fettle.diagnose.original import Original
from fettle.errors import RecipeError
from fettle.models.anatomy import Anatomy, Linear
from fettle.models.checkpoint import Checkpoint
from fettle.workers import Workers

SAMPLE_TOKENS = 4096
PIECE_TOKENS = 256


def gradient_obstacle(linear: Linear, anatomy: Anatomy) -> str | None:
    """Why the gradient of `linear` cannot be found, in words; None if it can."""
    if not anatomy.causal or anatomy.head is None:
        return "the model has no language-model head, so there are no predictions to go backwards from"
    if linear.block is None:
        return f"{linear.name} stands outside the blocks, and gradients are found inside them"
    return None


def refuse_without_gradient(linear: Linear, anatomy: Anatomy, method: str) -> None:
    """Raises RecipeError where a method wants a gradient that nobody can give."""
    obstacle = gradient_obstacle(linear, anatomy)
    if obstacle is not None:
        raise RecipeError(
            f"{method} looks at the gradient of the loss: {obstacle}. Leave it out with where:, or use wanda"
        )


class LossGradients:
    """See the module's text; make it inside of a `Workers` context with gradients off."""

    def __init__(
        self, checkpoint: Checkpoint, anatomy: Anatomy, windows: tuple[Tensor, ...], *, device: str, workers: Workers
    ) -> None:
        chosen: list[Tensor] = []
        for ids in windows:
            if chosen and sum(map(len, chosen)) + len(ids) > SAMPLE_TOKENS:
                break
            chosen.append(ids)
        sample = Windows(ids=tuple(chosen), tokens=sum(map(len, chosen)), source="", sha256="", note="")
        self._original = Original(checkpoint, anatomy, sample, device=device, workers=workers)
        self._workers = workers

    def of_block(self, index: int) -> dict[str, Tensor]:
        """The statistic of every linear of a block, float32 [out, in], by the linear's name."""
        self._original.load(index)
        with torch.no_grad():
            seen = self._original.activations(index)
        self._original.free(index)
        names = list(seen)
        return dict(zip(names, self._workers.map(lambda name: mean_gradient(seen[name]), names), strict=True))


def mean_gradient(seen: Activations) -> Tensor:
    """float32 [out, in] from inputs [tokens, in] and output gradients [draws, tokens, out]."""
    total = torch.zeros(seen.gradients.shape[2], seen.inputs.shape[1])
    pieces = 0
    for draw in seen.gradients:
        for start in range(0, len(draw), PIECE_TOKENS):
            piece = slice(start, start + PIECE_TOKENS)
            total += (draw[piece].T @ seen.inputs[piece]).abs_()
            pieces += 1
    return total / max(1, pieces)
