"""How much a block is missed: three answers, from passes of text through the model.

    block influence      BI[l] = 1 - E cos(x[l], x[l+1])            over tokens; x[l] enters block l
        Men et al.: ShortGPT, 2024, https://arxiv.org/abs/2403.03853, eq. 1. The blocks with the least go, all at once.
    angular distance     d[l, n] = E arccos(cos(x[l], x[l+n])) / π
        Gromov et al.: The Unreasonable Ineffectiveness of the Deeper Layers, 2024, https://arxiv.org/abs/2403.17887,
        eq. 7. n neighbouring blocks go, those whose input and output are nearest. The paper looks at the last token of
        a window; here all count, which needs fewer windows.
    perplexity           the mean loss of the model without block l; the block with the least goes, then the others are
        measured again without it (Kim et al.: Shortened LLaMA, 2024, https://arxiv.org/abs/2402.02834, at once).

Cost: one pass for the first two. The third runs every candidate from its block to the end, half of blocks² block runs
for each block that goes; a block is read once a round, and the states of all candidates are held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fettle.methods.reshape.subject import States, Subject, total
from fettle.models.skeleton import Skeleton


def block_influence(subject: Subject) -> list[float]:
    """BI of each block, float64 sums over all tokens of all windows."""
    skeleton, hidden = subject.skeleton()
    found = []
    for index in range(len(subject.anatomy.blocks)):
        skeleton.load_block(index)
        after = subject.run_block(skeleton, index, hidden)
        skeleton.free_block(index)
        found.append(1.0 - _mean([_cosines(a, b) for a, b in zip(hidden, after, strict=True)]))
        hidden = after
    return found


def angular_distances(subject: Subject, count: int) -> list[float]:
    """d[l, count] for every l at which `count` blocks can begin."""
    skeleton, hidden = subject.skeleton()
    kept, found = [hidden], []
    for index in range(len(subject.anatomy.blocks)):
        skeleton.load_block(index)
        kept.append(subject.run_block(skeleton, index, kept[-1]))
        skeleton.free_block(index)
        if len(kept) > count:
            pairs = zip(kept.pop(0), kept[-1], strict=True)
            found.append(_mean([torch.arccos(_cosines(a, b).clamp(-1, 1)) / math.pi for a, b in pairs]))
    return found


def losses_without(subject: Subject, gone: Sequence[int]) -> dict[int, float]:
    """Mean loss, nats a token, of the model without `gone` and one more block, by that block."""
    skeleton, hidden = subject.skeleton()
    variants: dict[int, States] = {}
    for index in range(len(subject.anatomy.blocks)):
        if index in gone:
            continue
        skeleton.load_block(index)
        variants = {removed: subject.run_block(skeleton, index, states) for removed, states in variants.items()}
        variants[index] = hidden
        hidden = subject.run_block(skeleton, index, hidden)
        skeleton.free_block(index)
    skeleton.load_head()
    return {removed: mean_loss(subject, skeleton, states) for removed, states in variants.items()}


def model_loss(subject: Subject) -> float:
    """Mean loss of a whole model on the text, nats a token."""
    skeleton, hidden = subject.skeleton()
    for index in range(len(subject.anatomy.blocks)):
        skeleton.load_block(index)
        hidden = subject.run_block(skeleton, index, hidden)
        skeleton.free_block(index)
    skeleton.load_head()
    return mean_loss(subject, skeleton, hidden)


def mean_loss(subject: Subject, skeleton: Skeleton, states: States) -> float:
    """Mean negative log-likelihood of the windows' next tokens, nats, from the last block's outputs."""

    def one(window: int) -> float:
        logits = skeleton.logits(states[window])[0, :-1].float()
        targets = subject.windows[window][1:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return float(loss.sum(dtype=torch.float64))

    tokens = sum(len(ids) - 1 for ids in subject.windows)
    return total(subject.workers.map(one, range(len(states)))) / tokens


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """float64 [tokens]."""
    return torch.nn.functional.cosine_similarity(one[0].double(), other[0].double(), dim=-1)


def _mean(windows: Sequence[Tensor]) -> float:
    return total([float(window.sum()) for window in windows]) / sum(len(window) for window in windows)
