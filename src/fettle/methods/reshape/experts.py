"""Fewer experts: those that the router sends least to go, or go into the ones most like them.

Which go: the router's mass, Σ over tokens of the weight that an expert gets among the top k (0 where it is not chosen):
Muzio et al.: SEER-MoE, 2024, https://arxiv.org/abs/2404.05089 (soft counts). `score: magnitude` takes ‖W‖ of the expert
and no text. Every block keeps as many, at least as many as a token is sent to.

With `merge`, each expert that goes is averaged, by the masses, into the kept one whose row of the router is most like
its own (Li et al.: MC-SMoE, 2023, https://arxiv.org/abs/2310.01334, which compares router logits and aligns neurons
first; here neither is done, so neurons that stand in another order are averaged as they stand). The router keeps the
rows of those that stay: tokens of the others go where their next choice is.

Without `merge` the result is the original with the removed experts' router logits at -∞.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.reshape.subject import Reshaped, Subject
from fettle.models.anatomy import Block, Linear
from fettle.models.checkpoint import Checkpoint
from fettle.models.reshaped_config import with_sizes
from fettle.models.skeleton import Tap
from fettle.models.storage import read_weight
from fettle.models.view import Cut, Made, Piece, View


@dataclass(frozen=True, kw_only=True)
class FewerExperts:
    """Leaves out, or merges, the experts that the router sends least to."""

    name: ClassVar[str] = "fewer_experts"
    title: ClassVar[str] = "Fewer experts"
    source: ClassVar[str] = "after SEER-MoE, Muzio et al. 2024, https://arxiv.org/abs/2404.05089, and MC-SMoE"
    statistics: ClassVar[tuple[str, ...]] = ("text",)
    objective: ClassVar[str] = "shape"

    experts: float = field(default=0.5, metadata={"help": "the share of experts kept", "minimum": 1e-3, "maximum": 1.0})
    merge: bool = field(default=False, metadata={"help": "average those that go into the ones most like them"})
    score: Literal["router", "magnitude"] = field(default="router", metadata={"help": "how experts are judged"})

    def needs(self) -> tuple[str, ...]:
        """Text, for the router's mass."""
        return self.statistics if self.score == "router" else ()

    def validate(self) -> None:
        """Nothing beyond the fields' bounds."""

    def label(self) -> str:
        """experts-0.5."""
        return f"experts-{self.experts:g}" + ("-merged" if self.merge else "")

    def reshape(self, subject: Subject) -> Reshaped:
        """The model with fewer experts in every block that has any."""
        _ = subject.family
        routers = {block.index: _router(block) for block in subject.anatomy.blocks}
        mixtures = [block for block in subject.anatomy.blocks if routers[block.index] is not None]
        if not mixtures:
            raise RecipeError(f"fewer_experts: this {subject.anatomy.family} model has no experts; leave the step out")
        total = _experts(mixtures[0])
        count = math.floor(self.experts * total + 1e-9)
        chosen = int(subject.checkpoint.config.get("num_experts_per_tok", 1))
        if count < chosen:
            raise RecipeError(
                f"fewer_experts: experts={self.experts:g} leaves {count} of {total} experts, and a token goes to "
                f"{chosen}; keep at least {chosen / total:g}"
            )
        masses = _router_masses(subject, chosen) if self.score == "router" else _norms(subject, mixtures)
        kept = {index: torch.sort(_best(mass, count)).values for index, mass in masses.items()}
        view = self._view(subject, mixtures, kept, masses, count)
        decided = {
            "method": self.name, "score": self.score, "merged": self.merge,
            "kept": {str(index): found.tolist() for index, found in kept.items()},
        }  # fmt: skip
        return Reshaped(view=view, decided=decided)

    def _view(
        self, subject: Subject, mixtures: list[Block], kept: dict[int, Tensor], masses: dict[int, Tensor], count: int
    ) -> View:
        base = subject.checkpoint
        pieces: dict[str, Piece] = {name: Cut(name) for name in base.entries}
        for block in mixtures:
            router = _router(block)
            assert router is not None
            stays = kept[block.index]
            groups = _groups(read_weight(base, router), stays) if self.merge else {int(e): [int(e)] for e in stays}
            for linear in block.linears:
                if linear.expert is None:
                    continue
                del pieces[linear.weight_name]
                if linear.expert in groups:
                    place = int((stays == linear.expert).nonzero())
                    new = _renamed(linear, place)
                    members = groups[linear.expert]
                    pieces[new] = _merged(base, linear, members, masses[block.index])
            pieces[router.weight_name] = Cut(router.weight_name, rows=stays)
        return View.of(base, with_sizes(base.config, {"experts": count}), pieces)


def _router(block: Block) -> Linear | None:
    return next((linear for linear in block.linears if linear.role == "router"), None)


def _experts(block: Block) -> int:
    return 1 + max(linear.expert for linear in block.linears if linear.expert is not None)


def _best(mass: Tensor, count: int) -> Tensor:
    return torch.sort(mass, descending=True, stable=True).indices[:count]


def _renamed(linear: Linear, place: int) -> str:
    """The tensor's name under the expert's new number."""
    return linear.weight_name.replace(f".experts.{linear.expert}.", f".experts.{place}.")


def _router_masses(subject: Subject, chosen: int) -> dict[int, Tensor]:
    """By block: the weight that each expert gets among the top `chosen`, summed over tokens, float64 [experts]."""
    skeleton, hidden = subject.skeleton()
    found: dict[int, Tensor] = {}
    for block in subject.anatomy.blocks:
        skeleton.load_block(block.index)
        router = _router(block)

        def one(state: Tensor, block: Block = block) -> tuple[Tensor, dict[str, Tensor]]:
            tap = Tap()
            return skeleton.run_block(block.index, state, tap), {group: x.cpu() for group, x in tap.inputs.items()}

        ran = subject.workers.map(one, hidden)
        hidden = [state for state, _ in ran]
        if router is not None:
            weight = skeleton.weight(router).cpu()
            mass = torch.zeros(router.shape[0], dtype=torch.float64)
            for _, inputs in ran:
                shares = torch.softmax((inputs[router.input_group] @ weight.T).double(), dim=-1)
                top = shares.topk(chosen, dim=-1)
                mass.scatter_add_(0, top.indices.flatten(), top.values.flatten())
            found[block.index] = mass
        skeleton.free_block(block.index)
    return found


def _norms(subject: Subject, mixtures: list[Block]) -> dict[int, Tensor]:
    """By block: ‖W‖ of each expert, float64 [experts]."""
    found = {}
    for block in mixtures:
        squares = torch.zeros(_experts(block), dtype=torch.float64)
        for linear in block.linears:
            if linear.expert is not None:
                squares[linear.expert] += read_weight(subject.checkpoint, linear).double().square().sum()
        found[block.index] = squares.sqrt()
    return found


def _groups(rows: Tensor, kept: Tensor) -> dict[int, list[int]]:
    """Kept expert → itself and those that go into it: the nearest by the cosine of their router rows."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    groups = {int(expert): [int(expert)] for expert in kept}
    for expert in range(len(rows)):
        if expert not in groups:
            nearest = int(kept[(unit[kept] @ unit[expert]).argmax()])
            groups[nearest].append(expert)
    return groups


def _merged(base: Checkpoint, linear: Linear, members: list[int], masses: Tensor) -> Piece:
    """The mean of the members' tensors, weighted by their masses."""
    if len(members) == 1:
        return Cut(linear.weight_name)
    names = [linear.weight_name.replace(f".experts.{linear.expert}.", f".experts.{e}.") for e in members]
    weights = masses[torch.tensor(members)]
    shares = (weights / weights.sum() if float(weights.sum()) > 0 else torch.ones_like(weights) / len(members)).tolist()
    entry = base.entry(linear.weight_name)

    def make(source: Checkpoint) -> Tensor:
        total = torch.zeros(entry.shape)
        for name, share in zip(names, shares, strict=True):
            total += share * source.read(name).float()
        return total

    return Made(entry.dtype, entry.shape, make)
