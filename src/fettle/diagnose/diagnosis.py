"""diagnose: what each linear costs in each scheme, how the error travels, and where the model is sensitive.

For each linear and candidate, alone in the otherwise untouched model:

    measured     the changed model run from that block to the end, its KL to the original (all linears, or a seeded
                 choice)
    estimated    the second-order KL estimate and the gram estimate (`estimates.py`), for all
    SNR          of the weights and of the linear's outputs, in decibels

For each candidate in all linears at once: the relative error after every block, on the original's inputs (what this
block adds) and on compressed ones (what has come together until here), and the KL at the end.

Cost of the measurement: candidates · sampled linears · the blocks behind them; of all the rest: candidates solved once,
one backward pass, one product a candidate and linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fettle.data.windows import Windows
from fettle.diagnose.candidates import Candidate
from fettle.diagnose.channels import channel_facts
from fettle.diagnose.estimates import second_order, signal_to_noise_db, spearman
from fettle.diagnose.original import Original, States
from fettle.diagnose.scan import ScannedLinear, linears_of, scan
from fettle.evaluate.streaming import relative_error
from fettle.models.anatomy import Linear
from fettle.progress import Progress, Silent

ESTIMATES = ("kl_estimate", "gram_estimate")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one candidate does to one linear, alone."""

    linear: str
    candidate: str
    bits_per_weight: float
    weight_snr_db: float
    output_snr_db: float
    kl_estimate: float  # nats a token
    gram_estimate: float  # squared change of the outputs, a token
    kl: float | None = None  # measured; None for linears outside the sample

    @property
    def best_kl(self) -> float:
        """The measured KL, or its estimate where it was not measured."""
        return self.kl_estimate if self.kl is None else self.kl


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How the error of one candidate in all linears travels; relative errors after each block."""

    candidate: str
    original_inputs: list[float]
    compressed_inputs: list[float]
    kl: float  # of all linears together, measured
    kl_estimate_sum: float  # the sum of the estimates of each alone


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything found out; `linears` holds plain facts by linear (see `channels.py`)."""

    candidates: list[dict[str, Any]]
    linears: list[dict[str, Any]]
    effects: list[Effect]
    depth: list[Depth]
    correlation: dict[str, Any]
    measured_linears: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; the caller adds the schema's version and the paragraph of words."""
        return asdict(self)


def diagnose(
    original: Original,
    calibration: Windows | None,
    candidates: Sequence[Candidate],
    *,
    sample: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measures and estimates; `sample` linears, drawn by `seed`, are measured exactly, None for all of them."""
    names = [x.name for index in range(original.block_count) for x in linears_of(original, index)]
    measured = _drawn(names, sample, seed)
    effects: list[Effect] = []
    facts: list[dict[str, Any]] = []
    depth = _DepthWalk(original, candidates)
    with (progress or Silent()).task("diagnosing", original.block_count) as task:
        for index, linears in scan(original, calibration, candidates):
            kl = {x.linear.name: _measure(original, index, x, candidates) for x in linears if x.linear.name in measured}
            effects += _effects(original, linears, candidates, kl)
            facts += original.workers.map(_facts, linears)
            depth.block(index, linears)
            task.advance()
    return Diagnosis(
        candidates=[candidate.to_json() for candidate in candidates],
        linears=facts,
        effects=effects,
        depth=depth.finish(effects),
        correlation=correlations(effects, [candidate.label for candidate in candidates]),
        measured_linears=len(measured),
        tokens=original.tokens,
    )


def correlations(effects: Sequence[Effect], labels: Sequence[str]) -> dict[str, Any]:
    """Spearman's rank correlation of each estimate with the measured KL: over all pairs, and by candidate."""

    def one(name: str, chosen: Sequence[Effect]) -> float | None:
        pairs = [(effect.kl, getattr(effect, name)) for effect in chosen if effect.kl is not None]
        return spearman([kl for kl, _ in pairs], [estimate for _, estimate in pairs])

    return {
        name: {
            "all": one(name, effects),
            "by_candidate": {label: one(name, [e for e in effects if e.candidate == label]) for label in labels},
        }
        for name in ESTIMATES
    }


def _drawn(names: Sequence[str], sample: int | None, seed: int) -> set[str]:
    if sample is None or sample >= len(names):
        return set(names)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {names[place] for place in order[:sample]}


def _measure(original: Original, index: int, found: ScannedLinear, candidates: Sequence[Candidate]) -> dict[str, float]:
    """KL of every candidate in this linear alone, by label."""
    variants: list[States] = []
    for candidate in candidates:
        original.skeleton.set_weight_(found.linear, found.quantized[candidate.label].dequantize())
        variants.append(original.run(index, original.states[index]))
    original.skeleton.set_weight_(found.linear, found.weight)
    kl = original.kl(original.run_on(index, variants))
    return {candidate.label: value for candidate, value in zip(candidates, kl, strict=True)}


def _effects(
    original: Original,
    linears: Sequence[ScannedLinear],
    candidates: Sequence[Candidate],
    measured: dict[str, dict[str, float]],
) -> list[Effect]:
    def one(piece: tuple[ScannedLinear, Candidate]) -> Effect:
        found, candidate = piece
        difference = found.quantized[candidate.label].dequantize() - found.weight
        kl, gram = second_order(difference, found.seen)
        return Effect(
            linear=found.linear.name,
            candidate=candidate.label,
            bits_per_weight=candidate.scheme.bits_per_weight(found.linear.shape),
            weight_snr_db=signal_to_noise_db(found.weight, difference),
            output_snr_db=signal_to_noise_db(found.seen.inputs @ found.weight.T, found.seen.inputs @ difference.T),
            kl_estimate=kl,
            gram_estimate=gram,
            kl=measured.get(found.linear.name, {}).get(candidate.label),
        )

    return original.workers.map(one, [(found, candidate) for found in linears for candidate in candidates])


def _facts(found: ScannedLinear) -> dict[str, Any]:
    linear: Linear = found.linear
    return {
        "name": linear.name,
        "block": linear.block,
        "role": linear.role,
        "shape": list(linear.shape),
        **channel_facts(found.weight, found.seen),
    }


class _DepthWalk:
    """The sample through the compressed blocks, one stream a candidate."""

    def __init__(self, original: Original, candidates: Sequence[Candidate]) -> None:
        self.original = original
        self.streams: dict[str, States] = {candidate.label: original.states[0] for candidate in candidates}
        self.alone: dict[str, list[float]] = {label: [] for label in self.streams}
        self.together: dict[str, list[float]] = {label: [] for label in self.streams}

    def block(self, index: int, linears: Sequence[ScannedLinear]) -> None:
        """Sends both kinds of inputs through the loaded block with every candidate in all its linears."""
        original = self.original
        entering, right = original.states[index], original.states[index + 1]
        for label, stream in self.streams.items():
            for found in linears:
                original.skeleton.set_weight_(found.linear, found.quantized[label].dequantize())
            self.alone[label].append(relative_error(original.run(index, entering), right))
            self.streams[label] = original.run(index, stream)
            self.together[label].append(relative_error(self.streams[label], right))
        for found in linears:
            original.skeleton.set_weight_(found.linear, found.weight)

    def finish(self, effects: Sequence[Effect]) -> list[Depth]:
        """The figures of every candidate, the KL at the end beside the sum of the estimates."""
        labels = list(self.streams)
        kl = self.original.kl([self.streams[label] for label in labels])
        return [
            Depth(
                candidate=label,
                original_inputs=self.alone[label],
                compressed_inputs=self.together[label],
                kl=value,
                kl_estimate_sum=sum(effect.kl_estimate for effect in effects if effect.candidate == label),
            )
            for label, value in zip(labels, kl, strict=True)
        ]
