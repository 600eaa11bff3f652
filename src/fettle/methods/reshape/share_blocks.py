"""Sharing blocks: neighbouring blocks get the same matrices, stored once; with thin differences, if asked for.

Lan et al.: ALBERT, 2019, https://arxiv.org/abs/1909.11942, train a model whose blocks are all the same; here a trained
model's neighbours are tied. What stands for the matrices W_i of a group, with G_i the grams of what they read:

    regression   B = (Σ W_i·G_i)·(Σ G_i)⁻¹       the least Σ tr((W_i - B)·G_i·(W_i - B)ᵀ), the outputs' error: Jin et
                                                 al.: RegMean, 2022, https://arxiv.org/abs/2212.09849, eq. 2
    mean         B = mean of the W_i
    block        B = the matrices of one of them, the one with which the text's loss is least; group by group

    rank r       W_i ≈ B + L_i·R_i               the product with the least output error, as in svd_llm; cf. Bae et
                                                 al. 2024, https://arxiv.org/abs/2410.20672

Norms and biases stay each block's own: they are small, and tell the blocks apart. The model computes as much as before;
what shrinks is its files, and its memory where an engine keeps a shared matrix once. Plain transformers has no word for
tied blocks: the folder says so in its configuration and is refused there, unless `written_out` gives each block a copy.

Differs from the papers: RegMean's grams are damped instead of having their off-diagonals scaled; nothing is retrained.

Cost: one pass for the grams, of one group of blocks at a time; for each group and matrix one solve of [in, in] and one
eigendecomposition a block. What is made is held until it is written: the new matrices, in the model's own type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.quantize.low_rank import best_factors, fitted_right
from fettle.methods.reshape.block_scores import model_loss
from fettle.methods.reshape.subject import Reshaped, Subject, total
from fettle.methods.statistics import STATISTICS
from fettle.models.anatomy import Linear, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.shared_tensors import common_name, factor_names
from fettle.models.storage import read_weight
from fettle.models.tap import Tap
from fettle.models.view import Cut, Made, Piece, View

Common = Literal["regression", "mean", "block"]
Members = Sequence[tuple[Linear, ...]]  # for each matrix of a block, the same one of all blocks of a group


@dataclass(frozen=True, kw_only=True)
class ShareBlocks:
    """Gives neighbouring blocks the same matrices, and stores them once."""

    name: ClassVar[str] = "share_blocks"
    title: ClassVar[str] = "Sharing blocks"
    source: ClassVar[str] = (
        "after ALBERT, Lan et al. 2019, and RegMean, Jin et al. 2022, https://arxiv.org/abs/2212.09849"
    )
    statistics: ClassVar[tuple[str, ...]] = ("text",)
    objective: ClassVar[str] = "shape"

    group: int = field(default=2, metadata={"help": "how many neighbouring blocks share their matrices", "minimum": 2})
    common: Common = field(
        default="regression",
        metadata={"help": "what they share: the least output error of all, the mean, or the best block's matrices"},
    )
    difference_rank: int = field(
        default=0, metadata={"help": "width of two thin matrices that each block keeps of its own", "minimum": 0}
    )
    damping: float = field(
        default=0.01, metadata={"help": "added to the grams' diagonals, of their mean", "minimum": 0.0, "maximum": 1.0}
    )
    written_out: bool = field(
        default=False, metadata={"help": "store a copy for every block: no smaller, but plain transformers loads it"}
    )

    def needs(self) -> tuple[str, ...]:
        """Text, unless the mean is enough."""
        return () if self.common == "mean" and not self.difference_rank else self.statistics

    def validate(self) -> None:
        """Any values go together."""

    def label(self) -> str:
        """share-2, or share-2-rank8."""
        return f"share-{self.group}" + (f"-rank{self.difference_rank}" if self.difference_rank else "")

    def reshape(self, subject: Subject) -> Reshaped:
        """The model with tied blocks."""
        _ = subject.family
        groups = self._groups(subject)
        self._require_smaller(subject, groups)
        made, losses, errors = _Tied(subject, self.written_out), [], []
        weighed = bool(self.needs()) and (self.common != "block" or self.difference_rank > 0)
        for blocks, grams in _grams(subject, groups) if weighed else ((blocks, {}) for blocks in groups):
            members = list(zip(*(subject.anatomy.blocks[index].linears for index in blocks), strict=True))
            chosen = 0
            if self.common == "block":
                found = [self._loss_with(subject, made, members, place) for place in range(len(blocks))]
                losses.append(found)
                chosen = found.index(min(found))
            missed = [self._tie(subject, made, linears, grams, chosen) for linears in members]
            errors.append(total([lost for lost, _ in missed]) / total([energy for _, energy in missed]))
        decided = {
            "method": self.name, "shared": groups, "common": self.common, "difference_rank": self.difference_rank,
            "output_errors": errors, **({"losses": losses} if losses else {}),
        }  # fmt: skip
        return Reshaped(view=made.view(), decided=decided)

    def _groups(self, subject: Subject) -> list[list[int]]:
        """Numbers of the blocks that share; a last one that is left over keeps its own."""
        blocks = subject.anatomy.blocks
        groups = [list(range(s, min(s + self.group, len(blocks)))) for s in range(0, len(blocks), self.group)]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            raise RecipeError(f"share_blocks: a model of {len(blocks)} block has no neighbours to share with")
        for group in groups:
            kinds = [[(x.role, x.shape, x.expert) for x in blocks[index].linears] for index in group]
            if any(kind != kinds[0] for kind in kinds):
                raise RecipeError(
                    f"share_blocks: blocks {group} have other matrices (dense blocks between experts, widths of their "
                    "own), so they cannot share them; choose another group"
                )
        return groups

    def _require_smaller(self, subject: Subject, groups: Sequence[Sequence[int]]) -> None:
        """Raises RecipeError for differences so wide that the matrices would take more than those that they replace."""
        if self.written_out or not self.difference_rank:
            return
        before = after = 0
        widest = []
        for blocks in groups:
            for linear in subject.anatomy.blocks[blocks[0]].linears:
                out, width = linear.shape
                before += len(blocks) * out * width
                after += out * width + len(blocks) * min(self.difference_rank, out, width) * (out + width)
                widest.append((len(blocks) - 1) * out * width / (len(blocks) * (out + width)))
        if after >= before:
            raise RecipeError(
                f"share_blocks: difference_rank={self.difference_rank} leaves nothing to save: the shared matrices and "
                f"the differences would hold {after:,} numbers, the blocks' own hold {before:,}; for these matrices a "
                f"rank up to {math.ceil(min(widest)) - 1} makes each smaller"
            )

    def _loss_with(self, subject: Subject, made: _Tied, members: Members, place: int) -> float:
        """The text's loss where a group has the matrices of its block at `place`."""
        subject.require_predictions("common: block")
        tried = made.copy()
        for linears in members:
            tried.tie(linears, read_weight(subject.checkpoint, linears[place]))
        view = tried.view()
        return model_loss(replace(subject, checkpoint=view, anatomy=read_anatomy(view)))

    def _tie(
        self, subject: Subject, made: _Tied, linears: Sequence[Linear], grams: Mapping[str, Tensor], chosen: int
    ) -> tuple[float, float]:
        """Ties the same matrix of all blocks of a group; their outputs' error and energy, summed."""
        weights = [read_weight(subject.checkpoint, linear) for linear in linears]
        known = [grams.get(linear.name) for linear in linears]
        if self.common == "mean":
            common = torch.stack(weights).mean(0)
        else:
            common = weights[chosen] if self.common == "block" else _regressed(weights, known, self.damping)
        dtype = subject.checkpoint.entry(linears[0].weight_name).dtype
        common, rank = common.to(dtype).float(), min(self.difference_rank, *common.shape)
        pairs = [
            _difference(weight - common, gram, rank, self.damping, dtype)
            for weight, gram in zip(weights, known, strict=True)
        ]
        made.tie(linears, common, pairs if rank else None)
        lost = energy = 0.0
        for weight, gram, (left, right) in zip(weights, known, pairs, strict=True):
            rest = weight - common - left.float() @ right.float()
            lost += _energy(rest, gram)
            energy += _energy(weight, gram)
        return lost, energy


def _regressed(weights: Sequence[Tensor], grams: Sequence[Tensor | None], damping: float) -> Tensor:
    """B [out, in] with the least Σ tr((W - B)·(G + damping)·(W - B)ᵀ)."""
    width = weights[0].shape[1]
    top, bottom = torch.zeros(width, weights[0].shape[0], dtype=torch.float64), torch.zeros(width, width).double()
    for weight, gram in zip(weights, grams, strict=True):
        found = torch.eye(width).double() if gram is None else gram.double()
        mean = float(found.diagonal().mean())
        found = found + torch.eye(width).double() * (damping * mean if mean > 0 else 1.0)
        top += found @ weight.T.double()
        bottom += found
    solved: Tensor = torch.linalg.solve(bottom, top).T
    return solved.float()


def _difference(
    rest: Tensor, gram: Tensor | None, rank: int, damping: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two thin matrices for what a block has of its own; of no width for rank 0."""
    if not rank:
        return rest[:, :0], rest[:0]
    mean = 0.0 if gram is None else float(gram.diagonal().double().mean())
    unit = gram / mean if gram is not None and mean > 0 else torch.eye(rest.shape[1])
    left = best_factors(rest, rank, unit, damping=damping)[0].to(dtype)
    return left, fitted_right(rest, left.float()).to(dtype)


def _energy(weight: Tensor, gram: Tensor | None) -> float:
    """tr(W·G·Wᵀ): how much outputs hold; without a gram, inputs count alike."""
    wide = weight.double()
    return float((wide * (wide if gram is None else wide @ gram.double())).sum())


def _grams(subject: Subject, groups: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
    """Each group with the grams of its linears' inputs, by the linear's name; experts that saw nothing have none."""
    skeleton, hidden = subject.skeleton()
    last_of, gathered = {group[-1]: group for group in groups}, {}
    members = {index for group in groups for index in group}
    for index, block in enumerate(subject.anatomy.blocks):
        skeleton.load_block(index)

        def one(state: Tensor, index: int = index) -> tuple[Tensor, dict[str, Tensor]]:
            tap = Tap()
            return skeleton.run_block(index, state, tap), {group: x.cpu() for group, x in tap.inputs.items()}

        ran = subject.workers.map(one, hidden)
        hidden = [state for state, _ in ran]
        if index in members:
            by_inputs: dict[str, Tensor] = {}
            for linear in block.linears:
                inputs = [taken[linear.input_group] for _, taken in ran if linear.input_group in taken]
                if inputs and linear.input_group not in by_inputs:
                    by_inputs[linear.input_group] = _gram(subject, inputs)
                if inputs:
                    gathered[linear.name] = by_inputs[linear.input_group]
        skeleton.free_block(index)
        if index in last_of:
            yield last_of[index], gathered
            gathered = {}


def _gram(subject: Subject, inputs: list[Tensor]) -> Tensor:
    kind = STATISTICS["gram"]
    state = kind.start(inputs[0].shape[1])
    kind.add_(state, inputs, subject.workers)
    found: Tensor = kind.finish(state)
    return found


class _Tied:
    """The pieces of a view in which more and more matrices are one."""

    def __init__(self, subject: Subject, written_out: bool) -> None:
        self.subject, self.written_out = subject, written_out
        self.pieces: dict[str, Piece] = {name: Cut(name) for name in subject.checkpoint.entries}
        self.shared: dict[str, str] = {}

    def copy(self) -> _Tied:
        """One that can go another way."""
        found = _Tied(self.subject, self.written_out)
        found.pieces, found.shared = dict(self.pieces), dict(self.shared)
        return found

    def tie(
        self, linears: Sequence[Linear], common: Tensor, differences: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        """Gives these linears the matrix `common` [out, in], each with the product of its factors added."""
        turned = linears[0].slot.transposed
        names = [linear.weight_name for linear in linears]
        dtype = self.subject.checkpoint.entry(names[0]).dtype
        for place, name in enumerate(names):
            del self.pieces[name]
            pair = differences[place] if differences is not None else None
            if self.written_out:
                own = common if pair is None else common + pair[0].float() @ pair[1].float()
                self.pieces[name] = _held(own, dtype, turned)
                continue
            if pair is not None:
                for part, factor in zip(factor_names(name), pair[::-1] if turned else pair, strict=True):
                    self.pieces[part] = _held(factor, dtype, turned)
            if pair is not None or place:
                self.shared[name] = names[0] if pair is None else common_name(names[0])
        if not self.written_out:
            self.pieces[names[0] if differences is None else common_name(names[0])] = _held(common, dtype, turned)

    def view(self) -> View:
        """As it is by now."""
        base = self.subject.checkpoint
        return View.of(base, base.config, dict(self.pieces), shared=self.shared)


def _held(value: Tensor, dtype: torch.dtype, turned: bool) -> Made:
    """A tensor that is made already, as it is stored."""
    stored = (value.T if turned else value).to(dtype).contiguous()

    def make(_: Checkpoint) -> Tensor:
        return stored.clone()

    return Made(dtype, tuple(stored.shape), make)
