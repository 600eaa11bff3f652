"""A mix: a candidate for each linear; which linears choose together, what a mix stores, and the recipe that says it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fettle.diagnose.candidates import Candidate
from fettle.models.anatomy import Anatomy, Linear
from fettle.models.parts import FUSED_ROLES
from fettle.pipeline.recipe import CalibrationOptions, Recipe, Step
from fettle.pipeline.where import Where
from fettle.search.knapsack import Option, solve

Mix = dict[str, str]  # linear → the candidate's label
Sensitivities = Mapping[str, Mapping[str, float]]  # linear → label → KL estimate, nats a token

#: one scheme must do for them; one kernel multiplies all experts
ONE_SCHEME = (*FUSED_ROLES, frozenset({"expert_down"}))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be chosen: groups of linears, candidates, and the bytes that they may store together."""

    groups: tuple[tuple[Linear, ...], ...]
    candidates: tuple[Candidate, ...]
    storage: str
    limit_bytes: int

    def stored_bytes(self, mix: Mapping[str, str]) -> int:
        """Bytes of all linears in this mix, exactly."""
        by_label = {candidate.label: candidate for candidate in self.candidates}
        return sum(self._bytes(linear, by_label[mix[linear.name]]) for group in self.groups for linear in group)

    def best_mix(self, sensitivities: Sensitivities) -> Mix | None:
        """The mix that fits and has the least sum of sensitivities; None where nothing fits."""
        options = [
            [
                Option(
                    sum(self._bytes(linear, candidate) for linear in group),
                    sum(sensitivities[linear.name][candidate.label] for linear in group),
                )
                for candidate in self.candidates
            ]
            for group in self.groups
        ]
        picks = solve(options, self.limit_bytes)
        if picks is None:
            return None
        return {
            linear.name: self.candidates[pick].label
            for group, pick in zip(self.groups, picks, strict=True)
            for linear in group
        }

    def uniform_mixes(self) -> dict[str, Mix]:
        """The candidates that fit in all linears alike, by label."""
        names = [linear.name for group in self.groups for linear in group]
        mixes = {candidate.label: dict.fromkeys(names, candidate.label) for candidate in self.candidates}
        return {label: mix for label, mix in mixes.items() if self.stored_bytes(mix) <= self.limit_bytes}

    def smallest_bytes(self) -> int:
        """What the smallest candidates store."""
        return sum(
            min(sum(self._bytes(linear, candidate) for linear in group) for candidate in self.candidates)
            for group in self.groups
        )

    def _bytes(self, linear: Linear, candidate: Candidate) -> int:
        scheme = candidate.scheme
        return scheme.stored_bytes(linear.shape, scheme.storage_for(linear.shape, self.storage))


def grouped(anatomy: Anatomy, linears: Sequence[Linear], fused: str) -> tuple[tuple[Linear, ...], ...]:
    """The linears that choose together, in the model's order; with fused "free" each chooses alone.

    Fused are linears of one block and one of `ONE_SCHEME` that read the same inputs; the experts of a mixture, which
    one kernel multiplies, count as one.
    """
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear in linears:
        roles = next((roles for roles in ONE_SCHEME if linear.role in roles), None)
        if fused == "free" or roles is None:
            key: tuple[object, ...] = (linear.name,)
        else:
            read = linear.input_group if linear.expert is None else _of_any_expert(linear)
            key = (linear.block, read, min(roles))
        groups.setdefault(key, []).append(linear)
    return tuple(tuple(group) for group in groups.values())


def _of_any_expert(linear: Linear) -> str:
    return re.sub(rf"\b{linear.expert}\b(?!.*\b{linear.expert}\b)", "*", linear.input_group)


def as_recipe(
    mix: Mapping[str, str], candidates: Sequence[Candidate], title: str, calibration: CalibrationOptions
) -> Recipe:
    """An ordinary recipe: a step for each linear, by its name."""
    methods = {candidate.label: candidate.method for candidate in candidates}
    steps = tuple(Step(method=methods[label], where=Where(name=name)) for name, label in mix.items())
    return Recipe(name=f"mix-{title}", steps=steps, calibration=calibration)
