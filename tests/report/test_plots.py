"""Plots: the marks stand for the numbers, and nothing that a name holds becomes markup."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from fettle.report.plots import bars, histogram

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if e.get("class") == "mark"]


def test_bars_are_as_high_as_their_values():
    found = marks(bars({"a": 1.0, "b": 2.0, "c": 0.0}, title="t", unit="u", axis="x", description="d"))
    heights = [float(e.get("height")) for e in found]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.11)
    assert heights[2] == 0


def test_names_stay_text():
    svg = bars({"<script>": 1.0}, title="<b>", unit="&", axis="</svg>", description="'\"")
    root = ElementTree.fromstring(svg)
    assert not [e for e in root.iter() if e.tag.endswith(("script", "b"))]
    assert "<script>: 1 &" in [e.text for e in root.iter() if e.tag.endswith("title")]


def test_a_histogram_shows_every_token_once():
    edges = [0.0, 1e-6, 1e-5, 1e-4, 1e-3]
    found = marks(histogram(edges, [3, 0, 5, 2], title="t", unit="nats", description="d"))
    told = [e.find("title").text for e in found]
    assert [int(t.rsplit(": ", 1)[1].split()[0]) for t in told] == [3, 5, 2]
    assert histogram(edges, [0, 0, 0, 0], title="t", unit="u", description="d") == ""
