"""An adversarial mix: windows of the text on which student and teacher differ most as things stand.

For m places, candidates · m windows are drawn by the seed (all there are, where the text has no more), and the m with
the largest mean divergence are taken, the largest first and again from there where they are fewer. Loss-proportional
selection is old (online hard example mining, Shrivastava et al. 2016, https://arxiv.org/abs/1604.03540); for teachers
and students see adversarial distillation's search for samples between their decisions, Heo et al. 2019,
https://arxiv.org/abs/1805.05532, which makes samples where this one chooses them.

Cost: a forward pass of student and teacher for each candidate, once a segment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.text_mix import TrainingText, drawing_seed

Gap = Callable[[Tensor, Tensor], Tensor]  # which windows [n] and their ids [n, length] → how far apart, [n]


class Adversarial:
    """The hardest of some windows as a source."""

    def __init__(self, gap: Gap, text: TrainingText, fields: DataFields, seed: int) -> None:
        self.name, self.share = "adversarial", fields.adversarial
        self._gap, self._text, self._candidates, self._seed = gap, text, fields.candidates, seed

    def draw(self, first_step: int, windows: Tensor) -> dict[str, Tensor]:
        """As `Source.draw`: the hardest of the candidates, whatever would stand in these places."""
        generator = torch.Generator().manual_seed(drawing_seed(self._seed, first_step * 8191))
        pool = torch.randperm(self._text.learned, generator=generator)[: self._candidates * len(windows)]
        found = torch.cat([self._gap(part, self._text.ids[part]) for part in pool.unsqueeze(1)])
        hardest = pool[found.argsort(descending=True, stable=True)][: len(windows)]
        chosen = hardest.repeat(-(-len(windows) // len(hardest)))[: len(windows)]
        return {"window": chosen.contiguous(), "ids": self._text.ids[chosen].contiguous()}
