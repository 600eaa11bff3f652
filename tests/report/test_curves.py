"""Loss curves: a plot for each stage that trained, thinned where there are many steps."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from fettle.report.curves import MOST_POINTS, curve_plots


def stage(steps: int, looks: list[list[float]] | None = None, stopped: str = "") -> dict[str, object]:
    losses = [float(steps - i) for i in range(steps)]
    return {"name": "01-qat", "curve": {"losses": losses, "held_back": looks or [], "stopped": stopped}}


def points(svg: str) -> list[list[str]]:
    return [str(e.get("points")).split() for e in ElementTree.fromstring(svg).iter("polyline")]


def test_a_stage_that_compressed_has_no_curve() -> None:
    assert curve_plots([{"name": "01-compress", "curve": None}]) == []


def test_the_caption_tells_steps_best_look_and_why_it_stopped() -> None:
    ((caption, plot),) = curve_plots([stage(4, [[0, 2.5], [2, 1.25]], "2 minutes were over")])
    assert caption == "01-qat: loss over 4 steps; the least on windows held back was 1.25; stopped: 2 minutes were over"
    trained, held_back = points(plot)
    assert len(trained) == len(held_back) == 4
    heights = [float(point.split(",")[1]) for point in held_back]
    assert heights[0] == heights[1] < heights[2] == heights[3]  # down on the page is less


def test_the_caption_states_the_bytes_of_kept_answers() -> None:
    told = stage(4)
    told["curve"] |= {"answer_bytes": 11_160}  # type: ignore[operator]
    ((caption, _),) = curve_plots([told])
    assert caption == "01-qat: loss over 4 steps; the teacher's answers take 11.2 kB on disk"


def test_many_steps_are_shown_by_their_means() -> None:
    ((_, plot),) = curve_plots([stage(601)])
    assert len(points(plot)[0]) <= MOST_POINTS
    assert "mean of 11 steps" in plot
