"""The page of a diagnosis: what `fettle diagnose` found in, one self-contained HTML page out; the rules of page.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fettle.report.atomic import write_atomically
from fettle.report.plots import lines, rows
from fettle.report.shades import points, shades
from fettle.report.tables import NONE
from fettle.report.templates import render

LINEARS_SHOWN = 40  # in the table of what stands out; the JSON has all
LINES_SHOWN = 6  # candidates in one plot of lines: the page styles as many differently


def write_diagnosis(path: str | Path, document: Mapping[str, Any]) -> None:
    """Writes the page of one diagnosis, whole or not at all."""
    write_atomically(Path(path), render_diagnosis(document))


def render_diagnosis(document: Mapping[str, Any]) -> str:
    """The page as text.

    Raises:
        UsageError: the document lacks what every diagnosis has.
    """
    return render("diagnosis.html.j2", _view, document, "the diagnosis; make it again with fettle diagnose --json")


def _view(document: Mapping[str, Any]) -> dict[str, Any]:
    effects: Sequence[Mapping[str, Any]] = document["effects"]
    facts = {linear["name"]: linear for linear in document["linears"]}
    middle = sorted(document["depth"], key=lambda depth: (depth["kl"], depth["candidate"]))
    label = middle[len(middle) // 2]["candidate"]
    chosen = [effect for effect in effects if effect["candidate"] == label]
    return {
        "title": f"{document['model']} · diagnosis",
        "words": document["words"],
        "candidate": label,
        "kl_map": _map(chosen, facts, _kl, "KL of each linear alone", "nats a token"),
        "snr_map": _map(
            chosen, facts, lambda e: e["output_snr_db"], "Signal-to-noise of the outputs", "dB", logarithmic=False
        ),
        "roles": _by_role(chosen, facts),
        "agreement": _points(effects, "kl_estimate", "second-order estimate, nats a token"),
        "gram_agreement": _points(effects, "gram_estimate", "gram estimate", same_unit=False),
        "together": _depth(document["depth"], "compressed_inputs", "What has come together"),
        "alone": _depth(document["depth"], "original_inputs", "What each block adds"),
        "depth": document["depth"],
        "correlation": _correlation(document),
        "sensitive": _sensitive(chosen, facts),
        "text": document["text"],
        "tokens": document["tokens"],
        "calibration": document["calibration"],
        "command": document.get("command_line") or "",
        "versions": document["versions"],
        "measured": document["measured_linears"],
        "all": len(facts),
    }


def _kl(effect: Mapping[str, Any]) -> float:
    return float(effect["kl_estimate"] if effect["kl"] is None else effect["kl"])


def _map(
    effects: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], value: Any, title: str, unit: str, *,
    logarithmic: bool = True,
) -> Markup:  # fmt: skip
    """Role by block; an expert's role holds the largest of its block's experts."""
    blocks = 1 + max((facts[e["linear"]]["block"] for e in effects), default=0)
    table: dict[str, list[float | None]] = {}
    for effect in effects:
        linear, found = facts[effect["linear"]], value(effect)
        row = table.setdefault(linear["role"], [None] * blocks)
        before = row[linear["block"]]
        if found is not None and math.isfinite(found):
            row[linear["block"]] = found if before is None else max(before, found)
    told = f"{title}, by role and block, in {unit}."
    return Markup(shades(table, title=title, unit=unit, axis="block", description=told, logarithmic=logarithmic))


def _by_role(effects: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Markup:
    sums: dict[str, float] = {}
    for effect in effects:
        role = facts[effect["linear"]]["role"]
        sums[role] = sums.get(role, 0.0) + _kl(effect)
    ordered = dict(sorted(sums.items(), key=lambda item: -item[1]))
    described = ", ".join(f"{role} {value:.3g}" for role, value in ordered.items())
    return Markup(rows(ordered, title="KL by role", unit="nats a token, sum of each alone", description=described))


def _points(effects: Sequence[Mapping[str, Any]], key: str, across: str, *, same_unit: bool = True) -> Markup:
    pairs = [(f"{e['linear']}, {e['candidate']}", e[key], e["kl"]) for e in effects if e["kl"] is not None]
    return Markup(
        points(
            pairs, title="Estimated and measured", across=across, up="measured KL",
            description=f"{len(pairs)} pairs of linear and candidate on logarithmic axes.", same_unit=same_unit,
        )
    )  # fmt: skip


def _depth(depth: Sequence[Mapping[str, Any]], key: str, title: str) -> Markup:
    """Lines by candidate; where there are more than the page can tell apart, those with most error."""
    worst = sorted(depth, key=lambda d: -d["kl"])[:LINES_SHOWN]
    series = {d["candidate"]: [100 * error for error in d[key]] for d in depth if d in worst}
    return Markup(
        lines(
            series, title=title, unit="% of the signal", axis="block",
            description=f"Relative error after each block, {len(series)} candidates in all linears.",
        )
    )  # fmt: skip


def _correlation(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = document["correlation"]
    shown = [("all pairs", *(found[name]["all"] for name in ("kl_estimate", "gram_estimate")))]
    shown += [
        (label, found["kl_estimate"]["by_candidate"][label], found["gram_estimate"]["by_candidate"][label])
        for label in found["kl_estimate"]["by_candidate"]
    ]
    return [(name, *(NONE if rank is None else f"{rank:.3f}" for rank in ranks)) for name, *ranks in shown]


def _sensitive(effects: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each of the most sensitive linears: its figures, and its channels and weights that stand out."""
    table = []
    for effect in sorted(effects, key=lambda e: -_kl(e))[:LINEARS_SHOWN]:
        linear = facts[effect["linear"]]
        table.append(
            {
                "name": effect["linear"],
                "kl": NONE if effect["kl"] is None else f"{effect['kl']:.3g}",
                "estimate": f"{effect['kl_estimate']:.3g}",
                "snr": f"{effect['weight_snr_db']:.1f} / {effect['output_snr_db']:.1f}",
                "activation": _channel(linear["activations"]),
                "inputs": _channel(linear["input_channels"]),
                "outputs": _channel(linear["output_channels"]),
                "weight": _weight(linear["weights"]),
                "share": f"{linear['top_weights_share']:.0%}",
            }
        )
    return table


def _channel(channels: Sequence[Mapping[str, Any]]) -> str:
    return f"{channels[0]['channel']} ({channels[0]['ratio']:.1f}×)" if channels else NONE


def _weight(weights: Sequence[Mapping[str, Any]]) -> str:
    return f"{weights[0]['row']}, {weights[0]['column']} ({weights[0]['saliency']:.1g})" if weights else NONE
