"""How a pruned network recovers: its batch norms are measured again, and a few steps of training move the rest.

`recalibrate_`: pruning changes what reaches a batch norm, and its running mean and variance are of the network before.
They are measured anew over the images; no weight changes (Li et al.: EagleEye, 2020, https://arxiv.org/abs/2007.02491).

`fine_tune_`: AdamW with a step size that falls by a cosine, on

    loss = cross entropy(labels)  +  KL(original's probabilities ‖ ours)

with what there is: labels, the original's logits, or both (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The
original sees every image once, before. Both are functions of a network, and a caller may bring another.

transformers' Trainer is left to language models: its loop is about windows of tokens. Deterministic under the seed, on
one thread. Cost: three passes a step, of a network that is smaller by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.filters.dependencies import logits_of
from fettle.methods.filters.scores import ImageBatch

Heal = Callable[[nn.Module, int], None]  # a network, and which round it is, from 0; changes it in place


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How long and how fast it is trained.

    Attributes:
        steps: of the optimizer.
        batch: images a step.
        rate: the largest step size.
        weight_decay: AdamW's.
        seed: which images come when.
    """

    steps: int
    batch: int = 32
    rate: float = 1e-3
    weight_decay: float = 1e-3
    seed: int = 0


@torch.no_grad()
def recalibrate_(network: nn.Module, data: ImageBatch) -> int:
    """Measures the running mean and variance of every batch norm over the images; returns how many were measured.

    One image has no variance, so fewer than two change nothing.
    """
    network.eval()
    if len(data.images) < 2:
        return 0
    norms = [module for module in network.modules() if isinstance(module, BatchNorm) and module.track_running_stats]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches
        norm.train()
    if norms:
        for images, _ in data.batches():
            if len(images) > 1:
                logits_of(network, images)
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
    network.eval()
    return len(norms)


@torch.no_grad()
def logits_for(network: nn.Module, data: ImageBatch) -> Tensor:
    """float32 [images, classes] of all images, in eval mode."""
    network.eval()
    return torch.cat([logits_of(network, images) for images, _ in data.batches()])


def fine_tune_(network: nn.Module, data: ImageBatch, options: FineTuning, teacher: Tensor | None = None) -> float:
    """Trains the network in place, and leaves it in eval mode; returns the mean loss of the last tenth of the steps.

    Args:
        network: on the images' device.
        data: images, and labels where there are any.
        options: how long and how fast.
        teacher: float [images, classes], the original's logits, or None.

    Raises:
        RecipeError: neither labels nor a teacher.
        NonFiniteError: the loss is NaN or infinite.
    """
    if data.labels is None and teacher is None:
        raise RecipeError("prune_filters: healing needs labels or an original to learn from; give labelled images")
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate, weight_decay=options.weight_decay)
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(options.seed)  # dropout
        network.train()
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * _cosine(step, options.steps)
            picked = torch.randint(len(data.images), (options.batch,), generator=generator).to(data.images.device)
            loss = _loss(network, data, picked, teacher)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(f"healing step {step}: the loss is {losses[-1]}; give a smaller heal_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    network.zero_grad(set_to_none=True)
    network.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else 0.0


def _cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loss(network: nn.Module, data: ImageBatch, picked: Tensor, teacher: Tensor | None) -> Tensor:
    logits = logits_of(network, data.images[picked])
    loss = torch.zeros((), device=logits.device)
    if data.labels is not None:
        loss = loss + functional.cross_entropy(logits, data.labels[picked])
    if teacher is not None:
        target = functional.log_softmax(teacher[picked], dim=-1)
        ours = functional.log_softmax(logits, dim=-1)
        loss = loss + functional.kl_div(ours, target, log_target=True, reduction="batchmean")
    return loss
