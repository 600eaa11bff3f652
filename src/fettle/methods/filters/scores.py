"""How much a channel is missed: a number for each channel of a group, over every layer that would lose it.

    l1, l2          sum of |w|, or root of the sum of w², of all weights that go         (Li et al. 2017; DepGraph 2023)
    batch_norm      |γ| of the batch norms behind the filter                               (Liu et al. 2017, slimming)
    activation      mean |x| of the channel where it is read                               (Hu et al. 2016, after APoZ)
    taylor          Σ |w · ∂L/∂w|: what the loss changes by, to first order                (Molchanov et al. 2019)
    hessian         ½ Σ w² · E[(∂L/∂w)²]: to second order, with the Fisher diagonal        (LeCun et al. 1989)

A group's score is the sum over its members, so a channel that a residual addition ties to five others answers for all
of them. Where groups are ranked against each other, l1, l2, batch_norm and activation are divided by the group's mean,
since layers differ in scale; taylor and hessian are in units of the loss and compare as they are.

Differs from Torch-Pruning's own scores: its Taylor score leaves batch norms out, and its Hessian keeps the gradient of
the last image alone, as of version 1.6.1. Its magnitudes are the oracle of a test here.

Cost: taylor is one backward pass for all images, hessian one an image, activation one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fettle.errors import RecipeError
from fettle.methods.filters.dependencies import ChannelGroup, Member, logits_of

ScoreName = Literal["l2", "l1", "batch_norm", "activation", "taylor", "hessian"]
LOOKS_AT_IMAGES = ("activation", "taylor", "hessian")
LOOKS_AT_LABELS = ("taylor", "hessian")
COMPARABLE = ("taylor", "hessian")  # across groups, as they are
BATCH = 64


@dataclass(frozen=True)
class ImageBatch:
    """Images as the network takes them, and what they show.

    Attributes:
        images: float32 [images, channels, height, width], normalized.
        labels: int64 [images], or None.
    """

    images: Tensor
    labels: Tensor | None = None

    def drawn(self, count: int) -> ImageBatch:
        """`count` of the images, always the same ones; all where there are no more."""
        if count >= len(self.images):
            return self
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        picked = order[:count].to(self.images.device)
        return ImageBatch(self.images[picked], None if self.labels is None else self.labels[picked])

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Pieces of at most `size`, in order."""
        for start in range(0, len(self.images), size):
            labels = None if self.labels is None else self.labels[start : start + size]
            yield self.images[start : start + size], labels


def group_scores(
    network: nn.Module, groups: list[ChannelGroup], score: ScoreName, data: ImageBatch | None
) -> dict[str, Tensor]:
    """float64 [size] for each group, by its name: higher is missed more.

    Raises:
        RecipeError: images or labels that the score needs are missing, or no batch norm where it looks at those.
    """
    local = _local(network, groups, score, data)
    found = {}
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        seen = 0
        for member in group.members:
            values = local(member)
            if values is not None:
                seen += 1
                picked = values.double().cpu()[list(member.channels)]
                total.index_add_(0, torch.tensor(member.roots), picked)
        if not seen:
            raise RecipeError(
                f"prune_filters: nothing that the score {score} looks at is behind {group.name}; choose another score, "
                "such as l2"
            )
        found[group.name] = total.sqrt() if score == "l2" else total
    return found


def comparable(scores: Mapping[str, Tensor], score: ScoreName) -> dict[str, Tensor]:
    """Scores that can be ranked across groups."""
    if score in COMPARABLE:
        return dict(scores)
    return {name: values / mean if (mean := float(values.mean())) > 0 else values for name, values in scores.items()}


def channel_sums(values: Tensor, member: Member) -> Tensor:
    """[channels]: the sum of `values`, shaped like the member's weight, over all that belongs to a channel."""
    if member.side in ("out", "depthwise"):
        return values.flatten(1).sum(1)
    if member.side == "norm":
        return values
    parts = int(getattr(member.layer, "groups", 1))
    rows, columns = values.shape[0] // parts, values.shape[1]
    return values.reshape(parts, rows, columns, -1).sum((1, 3)).flatten()


def _local(
    network: nn.Module, groups: list[ChannelGroup], score: ScoreName, data: ImageBatch | None
) -> Callable[[Member], Tensor | None]:
    if score in ("l1", "l2"):
        power = 1 if score == "l1" else 2
        return lambda member: channel_sums(member.layer.weight.detach().abs().pow(power), member)
    if score == "batch_norm":
        return lambda member: member.layer.weight.detach().abs() if member.side == "norm" else None
    if data is None or not len(data.images):
        raise RecipeError(f"prune_filters: the score {score} looks at images, and there are none; give --images")
    if score == "activation":
        means = _mean_inputs(network, {m.layer for group in groups for m in group.members if m.side == "in"}, data)
        return lambda member: means[member.layer] if member.side == "in" else None
    if data.labels is None:
        raise RecipeError(
            f"prune_filters: the score {score} is about the loss, and the images have no labels; give labelled images, "
            "or the score activation"
        )
    saliency = _loss_saliency(network, score, data)

    def both(member: Member) -> Tensor:
        found = channel_sums(saliency[member.layer.weight], member)
        bias = getattr(member.layer, "bias", None)
        return found if bias is None or member.side == "in" else found + saliency[bias]

    return both


def _mean_inputs(network: nn.Module, readers: set[Any], data: ImageBatch) -> dict[Any, Tensor]:
    """float64 [in] for each reader: the mean absolute value of each channel that it reads."""
    sums: dict[Any, Tensor] = {}
    counts: dict[Any, int] = {}

    def listen(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        values = given[0].detach()  # [images, channels, height, width] or [images, channels]
        flat = values.transpose(0, 1).flatten(1).abs().double()
        sums[layer] = sums.get(layer, torch.zeros(len(flat), dtype=torch.float64, device=flat.device)) + flat.sum(1)
        counts[layer] = counts.get(layer, 0) + flat.shape[1]

    handles = [reader.register_forward_pre_hook(listen) for reader in readers]
    try:
        with torch.no_grad():
            for images, _ in data.batches():
                logits_of(network, images)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total / counts[layer] for layer, total in sums.items()}


def _loss_saliency(network: nn.Module, score: ScoreName, data: ImageBatch) -> dict[Tensor, Tensor]:
    """What the loss changes by without each weight, to first or second order; float64 in the weights' shapes."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    sums = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in parameters]
    for images, labels in data.batches(1 if score == "hessian" else BATCH):
        assert labels is not None
        with torch.enable_grad():
            loss = functional.cross_entropy(logits_of(network, images), labels, reduction="sum")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.double().square() if score == "hessian" else gradient.double())
    count = len(data.images)
    if score == "hessian":
        return {p: 0.5 * p.detach().double().square() * s / count for p, s in zip(parameters, sums, strict=True)}
    return {p: (p.detach().double() * s / count).abs() for p, s in zip(parameters, sums, strict=True)}
