"""Dropping blocks: the blocks that change the hidden states least are left out, and the others close up.

Men et al.: ShortGPT, 2024, https://arxiv.org/abs/2403.03853; Gromov et al. 2024, https://arxiv.org/abs/2403.17887. How
blocks are judged: `block_scores.py`.

A residual block adds to its input, so a model without it is still a model; its loss is what the block added. Nothing is
made up for here: healing is training's business. The result is the same architecture with fewer blocks, which every
loader knows; whatever the configuration says block by block (attention types, dense blocks between experts) is
rewritten for those that stay. GPT-2 may divide attention scores by the block's number
(scale_attn_by_inverse_layer_idx): there the new number over the old one goes into the queries.

Differs from the papers: the first block and the last can go like any other if the score says
so; `keep_ends` holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fettle.errors import RecipeError
from fettle.methods.reshape.block_scores import angular_distances, block_influence, losses_without
from fettle.methods.reshape.subject import Reshaped, Subject, parse_share
from fettle.models.anatomy import Block
from fettle.models.checkpoint import Checkpoint
from fettle.models.reshaped_config import with_blocks
from fettle.models.view import Cut, Made, Piece, View

Score = Literal["block_influence", "angular", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class DropLayers:
    """Leaves out whole blocks, those that the score misses least."""

    name: ClassVar[str] = "drop_layers"
    title: ClassVar[str] = "Dropping blocks"
    source: ClassVar[str] = "ShortGPT, Men et al. 2024, https://arxiv.org/abs/2403.03853, and Gromov et al. 2024"
    statistics: ClassVar[tuple[str, ...]] = ("text",)
    objective: ClassVar[str] = "shape"

    drop: int | None = field(default=None, metadata={"help": "how many blocks go", "minimum": 1})
    parameters: str | None = field(
        default=None, metadata={"help": "the share of all parameters that may stay, such as 0.6x"}
    )
    by: Score = field(default="block_influence", metadata={"help": "how blocks are judged"})
    keep_ends: bool = field(default=False, metadata={"help": "never drop the first and the last block"})

    def needs(self) -> tuple[str, ...]:
        """Text."""
        return self.statistics

    def validate(self) -> None:
        """Exactly one of `drop` and `parameters`."""
        if (self.drop is None) == (self.parameters is None):
            raise RecipeError(
                f"drop_layers: drop={self.drop}, parameters={self.parameters!r}; give one of them, such as drop: 2 or "
                "parameters: 0.6x"
            )
        if self.parameters is not None:
            parse_share(self.parameters, "parameters", self.name)

    def label(self) -> str:
        """drop-2, or drop-0.6x."""
        return f"drop-{self.drop if self.drop is not None else self.parameters}"

    def reshape(self, subject: Subject) -> Reshaped:
        """The model without the blocks that are missed least."""
        _ = subject.family
        count = self._count(subject)
        gone, scores = self._chosen(subject, count)
        kept = [index for index in range(len(subject.anatomy.blocks)) if index not in gone]
        decided = {"method": self.name, "by": self.by, "dropped": sorted(gone), "scores": scores}
        return Reshaped(view=without_blocks(subject, kept), decided=decided)

    def _count(self, subject: Subject) -> int:
        blocks = subject.anatomy.blocks
        ends = 2 if self.keep_ends else 0
        most = len(blocks) - max(1, ends)
        if self.drop is not None:
            count = self.drop
        else:
            assert self.parameters is not None
            limit = parse_share(self.parameters, "parameters", self.name) * subject.parameters
            smallest = min(_block_parameters(subject.checkpoint, block) for block in blocks)
            count = next((n for n in range(1, len(blocks)) if subject.parameters - n * smallest <= limit), len(blocks))
        if count > most:
            asked = f"drop={self.drop}" if self.drop is not None else f"parameters={self.parameters!r}"
            raise RecipeError(
                f"drop_layers: {asked} would drop {count} of {len(blocks)} blocks, and at most {max(0, most)} can go"
                f"{' beside the first and the last' if self.keep_ends else ': one has to stay'}; ask for less, or "
                "narrow the blocks as well (method narrow)"
            )
        return count

    def _chosen(self, subject: Subject, count: int) -> tuple[set[int], list[float]]:
        """The blocks that go; the score of each block (angular: of each first block; perplexity: the loss by round)."""
        blocks = len(subject.anatomy.blocks)
        held = {0, blocks - 1} if self.keep_ends else set()
        if self.by == "block_influence":
            scores = block_influence(subject)
            order = sorted((index for index in range(blocks) if index not in held), key=lambda i: (scores[i], i))
            return set(order[:count]), scores
        if self.by == "angular":
            scores = angular_distances(subject, count)
            starts = [s for s in range(len(scores)) if not held & set(range(s, s + count))]
            start = min(starts, key=lambda s: (scores[s], s))
            return set(range(start, start + count)), scores
        subject.require_predictions("perplexity")
        gone: set[int] = set()
        scores = []
        for _ in range(count):
            found = losses_without(subject, sorted(gone))
            allowed = [index for index in found if index not in held]
            best = min(allowed, key=lambda i: (found[i], i))
            gone.add(best)
            scores.append(found[best])
        return gone, scores


def without_blocks(subject: Subject, kept: Sequence[int]) -> View:
    """The model with these blocks alone, in this order."""
    base, blocks = subject.checkpoint, subject.anatomy.blocks
    pieces: dict[str, Piece] = {name: Cut(name) for name in subject.anatomy.tensors}
    for place, index in enumerate(kept):
        for name in blocks[index].tensors:
            new = _renumbered(name, index, place)
            pieces[new] = _queries(subject, name, index, place) or Cut(name)
    return View.of(base, with_blocks(base.config, kept), pieces)


def _renumbered(name: str, index: int, place: int) -> str:
    """The tensor's name with the block's new number: the first number of its name is the block's."""
    return name.replace(f".{index}.", f".{place}.", 1)


def _queries(subject: Subject, name: str, index: int, place: int) -> Piece | None:
    """Where scores are divided by the block's number, queries that make up for the new one; else None."""
    if not subject.checkpoint.config.get("scale_attn_by_inverse_layer_idx") or index == place:
        return None
    linear = next((x for x in subject.anatomy.blocks[index].linears if x.role == "query_key_value"), None)
    if linear is None or name not in (linear.weight_name, f"{linear.name}.bias"):
        return None
    entry, factor, width = subject.checkpoint.entry(name), (place + 1) / (index + 1), linear.shape[0] // 3

    def make(base: Checkpoint) -> torch.Tensor:
        value = base.read(name).float()
        value[..., :width] *= factor  # Conv1D: outputs stand last
        return value

    return Made(entry.dtype, entry.shape, make)


def _block_parameters(checkpoint: Checkpoint, block: Block) -> int:
    entries = (checkpoint.entries[name] for name in block.tensors)
    sizes: list[Any] = [torch.Size(entry.shape).numel() for entry in entries if not entry.is_buffer]
    return int(sum(sizes))
