"""On-policy samples: windows that the student writes, so that it is taught where its own mistakes lead it.

GKD, Agarwal et al. 2024, https://arxiv.org/abs/2306.13649: with the probability λ, here `on_policy`, a sequence comes
from the student instead of the data, and the teacher's distribution is compared with the student's on it (any
`divergence`). Ours: sequences begin with the first `prompt_tokens` tokens of a window of text; an end of text is a
token like others, so that every window is full; samples of one segment of `refresh_every` steps come from the student
at its beginning. No gradient flows through the drawing. `hard` leaves these windows out: nobody should learn its own
mistakes.

Cost: `length` decoding steps of the student for 16 windows at a time, through the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.sources.mix import MADE
from fettle.methods.train.text_mix import TrainingText, drawing_seed
from fettle.models.loading import LoadedModel

Completer = Callable[..., Tensor]
"""(loaded, prompts int64 [n, tokens], *, new_tokens, temperature, seed) → int64 [n, tokens + new_tokens]"""


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as it will when it is done: without dropout."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


class OnPolicy:
    """The student as a source of windows."""

    def __init__(
        self, loaded: LoadedModel, complete: Completer, text: TrainingText, fields: DataFields, seed: int
    ) -> None:
        self.name, self.share = "on_policy", fields.on_policy
        self._loaded, self._complete, self._text, self._fields, self._seed = loaded, complete, text, fields, seed

    def draw(self, first_step: int, windows: Tensor) -> dict[str, Tensor]:
        """As `Source.draw`: the beginnings of these windows, written on."""
        tree: Any = self._loaded.model
        prompts = self._text.ids[windows, : self._fields.prompt_tokens]
        with resting(tree):
            ids = self._complete(
                self._loaded,
                prompts,
                new_tokens=self._text.ids.shape[1] - prompts.shape[1],
                temperature=self._fields.sampling_temperature,
                seed=drawing_seed(self._seed, first_step * 8191),
            )
        return {"window": torch.full((len(ids),), MADE), "ids": ids.cpu().contiguous()}
