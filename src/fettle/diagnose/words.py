"""The diagnosis in one paragraph: what to keep high, and why; every word of it comes from the figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fettle.diagnose.channels import OUTLIER_RATIO
from fettle.diagnose.diagnosis import Diagnosis, Effect

NAMED = 3  # linears that are named


def in_words(found: Diagnosis) -> str:
    """One paragraph for people."""
    label = deciding_candidate(found)
    effects = sorted((e for e in found.effects if e.candidate == label), key=lambda e: (-e.best_kl, e.linear))
    total = sum(effect.best_kl for effect in effects)
    if not effects or total <= 0:
        return "No candidate changes the model's predictions on this text: there is nothing to keep high."
    facts = {linear["name"]: linear for linear in found.linears}
    count = min(NAMED, len(effects))
    top = effects[:count]
    share = sum(effect.best_kl for effect in top) / total
    role, role_share, role_weight = _heaviest(effects, facts, "role")
    block, block_share, block_weight = _heaviest(effects, facts, "block")
    sentences = [
        f"With {label}, each linear alone, the KLs of all {len(effects)} linears add up to {total:.3g} nats a token "
        f"({_how(found)}); together they cost {_together(found, label):.3g}.",
        f"Keep high: {_list([_reason(effect, effects, facts[effect.linear], total) for effect in top])}. "
        f"That is {share:.0%} of the KL in {count} of {len(effects)} linears.",
        f"For its size the role {role} costs most, {role_share:.0%} of the KL on {role_weight:.0%} of the weights; of "
        f"the blocks it is block {block}, {block_share:.0%} on {block_weight:.0%}.",
        f"Lowest risk: {_list([f'{e.linear} ({e.best_kl:.2g})' for e in effects[::-1][:count]])}.",
        _agreement(found),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def deciding_candidate(found: Diagnosis) -> str:
    """The candidate that the words speak of: where choices are made, the one in the middle by its KL together."""
    ordered = sorted(found.depth, key=lambda depth: (depth.kl, depth.candidate))
    return ordered[len(ordered) // 2].candidate


def _how(found: Diagnosis) -> str:
    if found.measured_linears == len(found.linears):
        return "measured"
    return f"measured for {found.measured_linears} of them, estimated for the others"


def _together(found: Diagnosis, label: str) -> float:
    return next(depth.kl for depth in found.depth if depth.candidate == label)


def _reason(effect: Effect, effects: Sequence[Effect], facts: Mapping[str, Any], total: float) -> str:
    """The linear's share, and what stands out about it."""
    told = [f"{effect.best_kl / total:.0%} of the KL"]
    median_snr = statistics.median(e.output_snr_db for e in effects)
    if effect.output_snr_db < median_snr - 1:
        told.append(f"its outputs keep {effect.output_snr_db:.1f} dB where the median linear keeps {median_snr:.1f}")
    reach = [e.best_kl / e.gram_estimate for e in effects if e.gram_estimate > 0]
    if reach and effect.gram_estimate > 0:
        factor = effect.best_kl / effect.gram_estimate / statistics.median(reach)
        if factor > 2:
            told.append(f"an error of its outputs weighs {factor:.1f} times the median linear's")
    strongest = (facts["activations"] or [{"ratio": 0.0}])[0]
    if strongest["ratio"] >= OUTLIER_RATIO:
        told.append(f"input channel {strongest['channel']} reaches {strongest['ratio']:.0f} times the median channel")
    return f"{effect.linear} ({'; '.join(told)})"


def _heaviest(effects: Sequence[Effect], facts: Mapping[str, Any], key: str) -> tuple[Any, float, float]:
    """The group of linears with most KL for its weights: its name, share of the KL, share of the weights."""
    kl: dict[Any, float] = {}
    weights: dict[Any, int] = {}
    for effect in effects:
        linear = facts[effect.linear]
        kl[linear[key]] = kl.get(linear[key], 0.0) + effect.best_kl
        weights[linear[key]] = weights.get(linear[key], 0) + linear["shape"][0] * linear["shape"][1]
    name = max(kl, key=lambda group: kl[group] / weights[group])
    return name, kl[name] / sum(kl.values()), weights[name] / sum(weights.values())


def _agreement(found: Diagnosis) -> str:
    ranks = [found.correlation[name]["all"] for name in ("kl_estimate", "gram_estimate")]
    if any(rank is None for rank in ranks):
        return ""
    return (
        f"On the {found.measured_linears} measured linears the second-order estimate ranks as the measurement does by "
        f"{ranks[0]:.3f}, the gram estimate by {ranks[1]:.3f} (1 is the same order)."
    )


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
