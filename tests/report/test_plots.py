"""Plots: the marks stand for the numbers, and nothing that a name holds becomes markup."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from fettle.report.plots import BOTTOM, HEIGHT, bars, histogram, lines, nice_ceiling, rows


def marks(svg: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if e.get("class") == "mark"]


TOLD = {"title": "t", "unit": "u", "description": "d"}


def words(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("text")]


def test_bars_are_as_high_as_their_values():
    heights = [float(e.get("height")) for e in marks(bars([1.0, 2.0, 0.0], axis="block", **TOLD))]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.11)
    assert heights[2] == 0


def test_rows_are_as_long_as_their_values_and_say_them():
    svg = rows({"query": 0.5, "a name of a model that is much too long for it": 0.25}, **TOLD)
    lengths = [float(e.get("width")) for e in marks(svg)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.11)
    assert words(svg) == ["query", "0.5", "a name of a model that is muc…", "0.25", "u"]
    assert rows({}, **TOLD) == ""
    assert [float(e.get("width")) for e in marks(rows({"a": 0.0}, **TOLD))] == [0]


def test_lines_go_through_their_values():
    svg = lines({"a": [1.0, 2.0, 4.0], "b": [4.0]}, axis="block", **TOLD)
    drawn = [e.get("points").split() for e in ElementTree.fromstring(svg).iter("polyline")]
    heights = [float(point.split(",")[1]) for point in drawn[0]]
    floor = HEIGHT - BOTTOM
    assert [(floor - y) / (floor - heights[2]) for y in heights] == pytest.approx([0.25, 0.5, 1], abs=0.01)
    assert float(drawn[1][0].split(",")[1]) == heights[2]
    assert words(svg)[-2:] == ["a", "b"]  # the legend


@pytest.mark.parametrize("plot", ["bars", "rows", "lines", "histogram"])
def test_every_plot_says_what_it_is_and_has_units(plot):
    drawn = {
        "bars": bars([1.0], axis="block", **TOLD), "rows": rows({"a": 1.0}, **TOLD),
        "lines": lines({"a": [1.0]}, axis="block", **TOLD), "histogram": histogram([0, 1e-3, 1e-2], [1, 2], **TOLD),
    }[plot]  # fmt: skip
    root = ElementTree.fromstring(drawn)
    assert (root.find("title").text, root.find("desc").text) == ("t", "d")
    assert root.get("role") == "img" and root.get("aria-label") == "t. d"
    assert any(word.startswith("u") for word in words(drawn))


@pytest.mark.parametrize(("blocks", "shown"), [(1, 1), (16, 16), (17, 9), (22, 11), (80, 16)])
def test_block_numbers_do_not_run_into_each_other(blocks, shown):
    svg = bars([1.0] * blocks, axis="block", **TOLD)
    under = [
        e
        for e in ElementTree.fromstring(svg).iter("text")
        if e.get("text-anchor") == "middle" and (e.text or "").isdigit()
    ]
    assert len(under) == shown
    assert len(marks(svg)) == blocks


@pytest.mark.parametrize(
    ("value", "top"),
    [(0, 1), (0.9, 1), (1, 1), (1.1, 2), (3, 4), (5, 6), (7.4, 8), (9, 10), (0.031, 0.04), (2638, 4000)],
)
def test_axes_end_at_round_numbers(value, top):
    assert nice_ceiling(value) == pytest.approx(top)


def test_names_stay_text():
    for svg in (rows({"<script>": 1.0}, title="<b>", unit="&", description="'\""),
                lines({"<script>": [1.0]}, title="<b>", unit="&", axis="</svg>", description="'\"")):  # fmt: skip
        root = ElementTree.fromstring(svg)
        assert not [e for e in root.iter() if e.tag.endswith(("script", "b"))]
        assert any("<script>" in (e.text or "") for e in root.iter("title"))
        assert any("<script>" in word for word in words(svg))


def test_a_histogram_shows_every_token_once():
    edges = [0.0, 1e-6, 1e-5, 1e-4, 1e-3]
    found = marks(histogram(edges, [3, 0, 5, 2], **TOLD))
    told = [e.find("title").text for e in found]
    assert [int(t.rsplit(": ", 1)[1].split()[0]) for t in told] == [3, 5, 2]
    assert histogram(edges, [0, 0, 0, 0], **TOLD) == ""
