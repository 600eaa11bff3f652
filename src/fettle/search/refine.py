"""From estimates to a mix that was measured.

The sum of the estimates is right where each linear's change is small and the changes do not answer each other. So the
chosen mix is measured, all its linears at once, and the best candidate that fits in all linears alike beside it. Where
the estimate of one of the two is off by more than `ESTIMATE_FACTOR`, the linears of each candidate are measured
together, without the others (of a candidate that the mix does not use: all linears); what that says scales the
candidate's estimates, and the choice is made again. After at most `ROUNDS` rounds the best mix that was measured wins,
so that a mix is never worse than one candidate everywhere, on this text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fettle.search.mixes import Mix, Problem, Sensitivities

ESTIMATE_FACTOR = 1.25  # between the predicted and the measured KL; beyond it, the estimates are rescaled
ROUNDS = 3

Measure = Callable[[Mapping[str, str]], float]  # the KL of a mix; linears that it leaves out stay as they are


@dataclass(frozen=True, kw_only=True)
class Round:
    """One mix that was measured."""

    name: str
    mix: Mix
    predicted_kl: float  # nats a token, the sum of the estimates as they were scaled then
    measured_kl: float
    stored_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data without the mix itself, which the recipe says."""
        return {key: value for key, value in asdict(self).items() if key != "mix"}


def settle(problem: Problem, sensitivities: Sensitivities, measure: Measure) -> tuple[Round, list[Round]]:
    """The best measured round, and all of them; the problem must have a solution."""
    scales = {candidate.label: 1.0 for candidate in problem.candidates}
    rounds: list[Round] = []
    uniform = _uniform(problem, sensitivities, measure)
    for number in range(ROUNDS + 1):
        scaled = _scaled(sensitivities, scales)
        mix = problem.best_mix(scaled)
        assert mix is not None, "checked before the scan"
        if any(found.mix == mix for found in rounds):
            break
        rounds.append(_measured(f"round {number}", mix, problem, scaled, measure))
        doubted = [rounds[-1], *(uniform if number == 0 else [])]
        if all(apart(found.predicted_kl, found.measured_kl) <= ESTIMATE_FACTOR for found in doubted):
            break
        if number < ROUNDS:
            scales |= _scales(mix, sensitivities, measure, unused=set(scales) if number == 0 else set())
    rounds += [found for found in uniform if all(found.mix != other.mix for other in rounds)]
    return min(rounds, key=lambda found: found.measured_kl), rounds


def _uniform(problem: Problem, sensitivities: Sensitivities, measure: Measure) -> list[Round]:
    """The candidate that is estimated best among those that fit in all linears, measured; none where none fits."""
    fitting = problem.uniform_mixes()
    if not fitting:
        return []
    label = min(fitting, key=lambda name: (_sum(sensitivities, fitting[name]), name))
    return [_measured(f"all {label}", fitting[label], problem, sensitivities, measure)]


def apart(first: float, second: float) -> float:
    """By what factor two positive numbers differ; at least 1."""
    if first <= 0 or second <= 0:
        return 1.0 if first == second else float("inf")
    return max(first / second, second / first)


def _measured(name: str, mix: Mix, problem: Problem, sensitivities: Sensitivities, measure: Measure) -> Round:
    return Round(
        name=name,
        mix=mix,
        predicted_kl=_sum(sensitivities, mix),
        measured_kl=measure(mix),
        stored_bytes=problem.stored_bytes(mix),
    )


def _scales(mix: Mix, sensitivities: Sensitivities, measure: Measure, unused: set[str]) -> dict[str, float]:
    """Measured over estimated KL of each candidate's linears in this mix, the others untouched; of the candidates in
    `unused` that it does not use, of all linears.
    """
    scales = {}
    for label in sorted(unused | set(mix.values())):
        part = {name: chosen for name, chosen in mix.items() if chosen == label} or dict.fromkeys(mix, label)
        estimated = _sum(sensitivities, part)
        if estimated > 0:
            scales[label] = measure(part) / estimated
    return scales


def _scaled(sensitivities: Sensitivities, scales: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {
        name: {label: value * scales[label] for label, value in by_label.items()}
        for name, by_label in sensitivities.items()
    }


def _sum(sensitivities: Sensitivities, mix: Mapping[str, str]) -> float:
    return sum(sensitivities[name][label] for name, label in mix.items())
