"""A curriculum: easy windows first, harder ones bit by bit.

How hard a window is, its mean loss under a model says (Bengio et al. 2009, https://doi.org/10.1145/1553374.1553380).
In step t of T_c = pace · steps, windows are drawn from the easiest c(t) of all, without repeating one inside a step
where there are enough (competence, Platanios et al. 2019, https://arxiv.org/abs/1903.09848, equations 5 and 6):

    linear   c(t) = min(1, c₀ + (1 - c₀) · t / T_c)
    root     c(t) = min(1, √(c₀² + (1 - c₀²) · t / T_c))            c₀ = 0.1

Then shuffled passes over all, as without. Losses are kept beside the checkpoints, so the order is the same list when a
killed run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.methods.train.kept import keep, recall, recall_json
from fettle.methods.train.sources.fields import Pacing
from fettle.methods.train.text_mix import TrainingText
from fettle.models.writer import write_json

START = 0.1  # c₀
LOSSES, IDENTITY = "difficulty.safetensors", "difficulty.json"


def competence(step: int, steps: int, pacing: Pacing) -> float:
    """c(t): the share of the windows in use in step `step` of `steps`; 1 from there on.

    >>> competence(0, 10, "root"), round(competence(5, 10, "linear"), 2), competence(10, 10, "root")
    (0.1, 0.55, 1.0)
    """
    if step >= steps:
        return 1.0
    if pacing == "linear":
        return START + (1 - START) * step / steps
    return float((START**2 + (1 - START**2) * step / steps) ** 0.5)


def paced_order(losses: Tensor, steps: int, batch_windows: int, seed: int, pacing: Pacing, pace: float) -> Tensor:
    """Which window each place of each step takes, int64 [steps · batch_windows].

    Args:
        losses: float [windows], how hard each is.
        steps: of the run.
        batch_windows: places a step.
        seed: of the drawing.
        pacing: how the share in use grows.
        pace: share of the steps until all are in use.
    """
    generator = torch.Generator().manual_seed(seed)
    easiest = losses.argsort(stable=True)
    growing = round(pace * steps)
    rows = []
    for step in range(growing):
        count = max(1, int(competence(step, growing, pacing) * len(losses)))
        picked = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-batch_windows // count))])
        rows.append(easiest[picked[:batch_windows]])
    left = (steps - growing) * batch_windows
    passes = [torch.randperm(len(losses), generator=generator) for _ in range(-(-left // len(losses)))]
    return torch.cat([*rows, *passes])[: steps * batch_windows]


def difficulties(
    judge: Callable[[], Callable[[Tensor], Tensor]], text: TrainingText, folder: Path, identity: dict[str, Any]
) -> Tensor:
    """float32 [learned]: the mean loss of every window that is learned from, computed once and kept in `folder`.

    Args:
        judge: gives ids [n, length] → mean loss of each window, [n]; asked only where nothing is known yet.
        text: the windows.
        folder: where they are kept.
        identity: whose losses of which text; others are computed again.
    """
    known = folder / IDENTITY
    told = {**identity, "text": text.sha256, "windows": list(text.ids.shape)}
    if not known.is_file() or recall_json(known) != told:
        folder.mkdir(parents=True, exist_ok=True)
        loss = judge()
        found = torch.cat([loss(part) for part in text.ids[: text.learned].unsqueeze(1)]).float().cpu()
        keep(folder, LOSSES, {"loss": found})
        write_json(known, told)
    kept: Tensor = recall(folder / LOSSES, {"loss": torch.Size([text.learned])})["loss"]
    return kept
