"""Loss curves as plots: what the stages of a training wrote down, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fettle.report.plots import lines
from fettle.report.tables import size

MOST_POINTS = 60


def curve_plots(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """(caption, plot) for every stage that trained."""
    return [_plot(stage) for stage in stages if stage.get("curve") and stage["curve"]["losses"]]


def _plot(stage: Mapping[str, Any]) -> tuple[str, Markup]:
    curve = stage["curve"]
    losses = [float(loss) for loss in curve["losses"]]
    span = -(-len(losses) // MOST_POINTS)
    means = [sum(part) / len(part) for part in (losses[i : i + span] for i in range(0, len(losses), span))]
    series = {"training text": means}
    looks = [(int(step), float(loss)) for step, loss in curve["held_back"]]
    if looks:
        series["held back"] = [_last_look(looks, index * span) for index in range(len(means))]
    unit = "step" if span == 1 else f"mean of {span} steps"
    told = f"; the least on windows held back was {min(loss for _, loss in looks):.4g}" if looks else ""
    stopped = f"; stopped: {curve['stopped']}" if curve.get("stopped") else ""
    kept = curve.get("answer_bytes") or 0
    disk = f"; the teacher's answers take {size(kept)} on disk" if kept else ""
    caption = f"{stage['name']}: loss over {len(losses)} steps{told}{stopped}{disk}"
    plot = lines(
        series, title=f"Loss of {stage['name']}", unit="loss", axis=unit,
        description=f"{caption}. From {losses[0]:.4g} in the first step to {losses[-1]:.4g} in the last.",
    )  # fmt: skip
    return caption, Markup(plot)


def _last_look(looks: Sequence[tuple[int, float]], step: int) -> float:
    """The held-back loss as it was known at a step."""
    return [loss for seen, loss in looks if seen <= step or seen == looks[0][0]][-1]
