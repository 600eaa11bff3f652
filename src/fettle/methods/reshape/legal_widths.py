"""How wide a model is, how wide it may become, and which units stay then: widths that are the same in every block.

Legal is what the configuration can say and kernels like: neurons and channels in multiples, whole key-value groups that
divide the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.reshape.subject import Subject
from fettle.methods.reshape.unit_scores import UnitScores
from fettle.methods.reshape.widths import Cuts, HeadShape, attention_of, head_shape, neuron_groups
from fettle.models.block_widths import BY_BLOCK, WIDTHS_KEY
from fettle.models.view import parameter_count


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How wide a model is to be.

    Attributes:
        neurons: neurons a block has now (dense blocks and experts may differ) → neurons that stay.
        heads: heads that stay.
        hidden: channels that stay.
    """

    neurons: dict[int, int]
    heads: HeadShape
    hidden: int

    @classmethod
    def of(cls, subject: Subject) -> Widths:
        """As it is."""
        blocks, embedding = subject.anatomy.blocks, subject.anatomy.embedding
        if WIDTHS_KEY in subject.checkpoint.config:
            raise RecipeError("the blocks have widths of their own already; narrow the model that they were made from")
        sizes = {down.shape[1] for block in blocks for down, _ in neuron_groups(block)}
        if embedding is None or not sizes:
            raise RecipeError(f"a {subject.anatomy.family} model has no embedding or feed-forward part to narrow")
        return cls(neurons={n: n for n in sorted(sizes)}, heads=head_shape(subject), hidden=embedding.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        neurons = {str(before): after for before, after in self.neurons.items()}
        return {
            "neurons": neurons, "heads": self.heads.heads, "kv_heads": self.heads.kv_heads, "hidden": self.hidden
        }  # fmt: skip

    def shared(self, neurons: float, heads: float, hidden: int, multiple: int) -> Widths:
        """The legal widths for these shares; RecipeError where nothing would be left."""
        kept = {n: legal(n, neurons, multiple, "a feed-forward part", "neurons") for n in self.neurons}
        return Widths(neurons=kept, heads=legal_heads(self.heads, heads, hidden), hidden=hidden)

    def parameters(self, subject: Subject) -> int:
        """How many parameters a model of these widths has; from headers."""
        return parameter_count(self.cut(subject, None).view())

    def cut(self, subject: Subject, scores: UnitScores | None) -> Cuts:
        """What is cut; without scores the first units stay, which is enough to count."""
        cuts, before = Cuts(subject), head_shape(subject)
        pick: Callable[[Tensor | None, int], Tensor] = _best
        neurons, heads = {}, {}
        for block in subject.anatomy.blocks:
            for down, _ in neuron_groups(block):
                of_these = None if scores is None else scores.neurons[down.name]
                neurons[down.name] = pick(of_these, self.neurons[down.shape[1]])
            output = attention_of(block)[0]
            heads[output.name] = best_heads(None if scores is None else scores.heads[output.name], before, self.heads)
        if any(before != after for before, after in self.neurons.items()):
            cuts.neurons(neurons)
        if self.heads != before:
            cuts.heads(heads, before, self.heads)
        assert subject.anatomy.embedding is not None
        if self.hidden != subject.anatomy.embedding.shape[1]:
            cuts.hidden(pick(None if scores is None else scores.hidden, self.hidden))
        return cuts


def cut_by_block(subject: Subject, widths: Widths, scores: UnitScores, multiple: int) -> tuple[Cuts, dict[str, Any]]:
    """Cuts to as many units in all as the widths have, spread over the blocks by their scores; and the widths.

    Raises:
        RecipeError: a family whose blocks cannot differ.
    """
    if subject.family.name not in BY_BLOCK:
        raise RecipeError(
            f"narrow: blocks of a {subject.family.name} model cannot have widths of their own (fused matrices, experts "
            f"or turned ones); families that can: {', '.join(sorted(BY_BLOCK))}. Leave by_block out"
        )
    blocks, before, cuts = subject.anatomy.blocks, head_shape(subject), Cuts(subject)
    downs = [next(neuron_groups(block))[0] for block in blocks]
    outputs = [attention_of(block)[0] for block in blocks]
    ((all_neurons, kept_neurons),) = widths.neurons.items()
    if widths.heads.group != before.group:
        raise RecipeError(
            "narrow: by_block keeps whole key-value groups, and this leaves less than one; keep more heads"
        )
    energies = [scores.neurons[down.name].square() for down in downs]
    neurons = [all_neurons] * len(blocks)
    if kept_neurons < all_neurons:
        neurons = spread_units(energies, kept_neurons // multiple * len(blocks), multiple)
    groups = [scores.heads[output.name].square().view(before.kv_heads, -1).sum(1) for output in outputs]
    kept_groups = spread_units(groups, widths.heads.kv_heads * len(blocks), 1)
    cuts.neurons({down.name: _best(e, n) for down, e, n in zip(downs, energies, neurons, strict=True)})
    sizes = [HeadShape(heads=k * before.group, kv_heads=k, size=before.size) for k in kept_groups]
    chosen = {o.name: best_heads(scores.heads[o.name], before, size) for o, size in zip(outputs, sizes, strict=True)}
    cuts.heads(chosen, before, None)
    if widths.hidden != Widths.of(subject).hidden:
        cuts.hidden(_best(scores.hidden, widths.hidden))
    cuts.by_block(neurons, kept_groups, before)
    return cuts, {"neurons": neurons, "kv_heads": kept_groups, "hidden": widths.hidden}


def spread_units(energies: Sequence[Tensor], total: int, multiple: int) -> list[int]:
    """How many units each block keeps, multiples, where `total` multiples stay in all: those with the most energy, and
    at least one multiple of each block. Of equals the earlier block's.
    """
    chunks = []
    for place, energy in enumerate(energies):
        ordered = torch.sort(energy, descending=True).values
        sums = ordered[: len(ordered) // multiple * multiple].view(-1, multiple).sum(1).tolist()
        chunks += [(-value, place) for value in sums[1:]]
    kept = [multiple] * len(energies)
    for _, place in sorted(chunks)[: total - len(energies)]:
        kept[place] += multiple
    return kept


def legal(size: int, share: float, multiple: int, what: str, name: str) -> int:
    """The largest multiple within a share of `size`; `size` itself for all.

    Raises:
        RecipeError: nothing would be left.
    """
    if share >= 1:
        return size
    found = math.floor(size * share / multiple + 1e-9) * multiple
    if found < 1:
        raise RecipeError(
            f"narrow: {name}={share:g} of {what} of {size} is less than one multiple of {multiple}, so nothing would "
            "be left; keep more, or give a smaller multiple"
        )
    return found


def legal_heads(shape: HeadShape, share: float, hidden: int) -> HeadShape:
    """Whole key-value groups within the share; where that is none, heads of one group. Their number divides the width,
    as Llama's configuration asks even where the head size is said.

    Raises:
        RecipeError: no head would be left.
    """
    if share >= 1:
        return shape
    for groups in range(math.floor(shape.kv_heads * share + 1e-9), 0, -1):
        if hidden % (groups * shape.group) == 0:
            return HeadShape(heads=groups * shape.group, kv_heads=groups, size=shape.size)
    most = math.floor(shape.heads * share + 1e-9)
    heads = next((n for n in range(min(most, shape.group), 0, -1) if hidden % n == 0), 0)
    if heads < 1:
        raise RecipeError(
            f"narrow: heads={share:g} of {shape.heads} heads leaves no head; keep at least {1 / shape.heads:g}"
        )
    return HeadShape(heads=heads, kv_heads=1, size=shape.size)


def _best(scores: Tensor | None, count: int) -> Tensor:
    """The positions of the `count` best, ascending; of equals the first."""
    if scores is None:
        return torch.arange(count)
    return torch.sort(torch.sort(scores, descending=True, stable=True).indices[:count]).values


def best_heads(scores: Tensor | None, before: HeadShape, after: HeadShape) -> Tensor:
    """The query heads that stay: those of the best groups, and of these the best where a group loses some."""
    energy = torch.zeros(before.heads) if scores is None else scores.square()
    by_group = energy.view(before.kv_heads, before.group)
    groups = _best(by_group.sum(1), after.kv_heads)
    inside = torch.stack([_best(by_group[group], after.group) for group in groups])
    return (groups[:, None] * before.group + inside).flatten()
