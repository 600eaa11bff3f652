"""Masks that change while weights learn: which weights go as the sparsity grows, and which come back.

Sparsity, in step t of T, with p the way from `pruned_from` to `pruned_until`, both shares of the steps:

    cubic      s(t) = s · (1 - (1 - p)³)          Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878, equation 1
    linear     s(t) = s · p
    one_shot   s(t) = s

What goes has the least score (`SCORES`): magnitude |w|; taylor |w · g|, g the gradient of this step's windows;
movement, a number that learns beside the weight by the gradient g · w, as if no weight were masked (Sanh et al. 2020,
https://arxiv.org/abs/2005.07683, equation 3), so that weights that grow stay however small they are.

With `regrow` α (RigL, Evci et al. 2020, https://arxiv.org/abs/1911.11134): of the k weights that stay, the α_t · k
least by |w| are exchanged for as many with the largest |g|, which begin at zero; α_t = α/2 · (1 + cos(π t / T_end)),
T_end the step of `pruned_until`. Without, what went stays away, unless the score is movement, whose weights may
return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fettle.methods.prune.selection import kept_by_score, on_the_way
from fettle.methods.train.sharding import whole
from fettle.tensors.patterns import Pattern

Score = Literal["magnitude", "taylor", "movement"]
Growth = Literal["cubic", "linear", "one_shot"]


class _Masked(torch.autograd.Function):
    """w · mask; the weight's gradient is masked, the score's is not."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor | None, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0] * mask, gradients[0] * weight if ctx.needs_input_grad[1] else None, None


class SparseLinear(nn.Module):
    """Takes the place of an `nn.Linear`; computes with the weights that stay.

    Attributes:
        weight: float32 [out, in], which learns where it stays.
        scores: float32 [out, in], which learns; None unless the score is movement.
        mask: bool [out, in], what stays; of the loop's files, not of its checkpoints.
        bias: of the linear that it replaces.
        last: the values of the last forward pass while gradients are asked for.
    """

    def __init__(self, inner: nn.Linear, *, movement: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(inner.weight.detach().float().clone())
        self.bias = None if inner.bias is None else nn.Parameter(inner.bias.detach().clone())
        self.scores = nn.Parameter(torch.zeros_like(self.weight)) if movement else None
        self.mask = torch.ones_like(self.weight, dtype=torch.bool)
        self.watched = False
        self.last: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mask = fn(self.mask)  # no buffer: several processes would send it to each other in every step
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        values: Tensor = _Masked.apply(self.weight, self.scores, self.mask)  # type: ignore[no-untyped-call]
        if self.watched:
            self.last = values
        return linear(inputs, values, self.bias)


def sparsity_at(step: int, target: float, growth: Growth, first: int, last: int) -> float:
    """s(t); `first` and `last` are the steps in which it begins to grow and is whole.

    >>> [round(sparsity_at(t, 0.8, "cubic", 0, 4), 4) for t in range(6)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """
    if growth == "one_shot" or step >= last:
        return target
    way = max(0.0, (step - first) / max(1, last - first))
    return target * (way if growth == "linear" else 1 - (1 - way) ** 3)


def exchanged_share(step: int, alpha: float, last: int) -> float:
    """α_t; 0 from `last` on."""
    return alpha / 2 * (1 + math.cos(math.pi * step / last)) if step < last else 0.0


def pruned(module: SparseLinear, gradient: Tensor | None, pattern: Pattern, sparsity: float, score: Score) -> Tensor:
    """The mask bool [out, in] at a sparsity; pure.

    Args:
        module: weight, scores and the mask so far.
        gradient: [out, in] of the masked weight, where the score is taylor.
        pattern: what is compared.
        sparsity: the share that goes.
        score: by what.
    """
    if sparsity <= 0:
        return torch.ones_like(module.mask)
    weight = whole(module.weight.detach())
    if score == "movement":
        assert module.scores is not None
        found = with_ties_broken(whole(module.scores.detach()), weight)
    else:
        found = weight.abs() if score == "magnitude" or gradient is None else (weight * gradient).abs()
        found = torch.where(module.mask, found + found.max() * 1e-6 + 1e-30, torch.zeros_like(found))
    return kept_by_score(found.cpu(), on_the_way(pattern, sparsity), sparsity).to(weight.device)


def with_ties_broken(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores from 0 on, float64 [out, in]; of equal ones that of the larger |w| is larger, and no order changes.

    A score that no gradient has reached is zero like its neighbours, and what goes then should not be what comes first.
    """
    found = scores.double() - scores.min()
    gaps = torch.unique(found).diff()
    gap = float(gaps.min()) if len(gaps) else 1.0
    return found + gap / 2 * weight.abs().double() / weight.abs().max().clamp_min(1e-30)


def regrown(weight: Tensor, gradient: Tensor, mask: Tensor, share: float, *, by_row: bool) -> Tensor:
    """The mask with a share of what stays exchanged for what the gradient asks for; pure.

    Args:
        weight: [out, in].
        gradient: [out, in], of all weights, those that are gone included.
        mask: bool [out, in].
        share: α_t.
        by_row: exchange inside each row; else inside the whole weight.
    """
    flat = mask if by_row else mask.reshape(1, -1)
    sizes, pulls = weight.abs().reshape(flat.shape), gradient.abs().reshape(flat.shape)
    found = flat.clone()
    for row in range(len(flat)):
        kept = flat[row].nonzero()[:, 0]
        gone = (~flat[row]).nonzero()[:, 0]
        count = min(round(share * len(kept)), len(gone))
        found[row, kept[sizes[row, kept].argsort(stable=True)[:count]]] = False
        found[row, gone[pulls[row, gone].argsort(descending=True, stable=True)[:count]]] = True
    return found.reshape(mask.shape)


def gradients_of(modules: list[SparseLinear], losses: Callable[[], Iterator[Tensor]]) -> list[Tensor]:
    """The mean gradient of every masked weight, those that are gone included; no parameter's gradient changes.

    Args:
        modules: the linears.
        losses: gives the losses of some windows one by one; each is used before the next is computed.
    """
    sums = [torch.zeros_like(module.mask, dtype=module.weight.dtype) for module in modules]
    count = 0
    for module in modules:
        module.watched = True
    try:
        for loss in losses():
            values = [module.last for module in modules]
            found = torch.autograd.grad(loss, [v for v in values if v is not None], allow_unused=True)
            for total, part in zip(sums, found, strict=True):
                if part is not None:
                    total.add_(part)
            count += 1
    finally:
        for module in modules:
            module.watched, module.last = False, None
    return [total / max(1, count) for total in sums]
