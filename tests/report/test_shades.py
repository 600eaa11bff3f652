"""Shaded tables and point clouds: valid drawings of what they are given, and nothing of nothing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from fettle.report.shades import points, shades

WORDS = {"title": "t", "description": "d"}


def test_a_cell_for_each_value_and_none_for_a_gap() -> None:
    drawn = shades({"down": [1e-3, None, 1e-1], "up": [float("inf"), 1e-2]}, unit="nats", axis="block", **WORDS)
    root = ElementTree.fromstring(drawn)
    assert len(root.findall("g")) == 3
    strengths = sorted(float(cell.attrib["fill-opacity"]) for cell in root.findall("g"))
    assert strengths == pytest.approx([0.06, 0.53, 1.0])  # equal factors are equal steps
    assert "down, block 2: 0.1 nats" in drawn


@pytest.mark.parametrize("same_unit", [True, False])
def test_points_lie_inside_and_say_their_name(same_unit: bool) -> None:
    pairs = [("<a>", 1e-4, 1e-6), ("b", 3.0, 2e-2), ("left out", 0.0, 1.0)]
    drawn = points(pairs, across="estimate", up="measured", same_unit=same_unit, **WORDS)
    dots = ElementTree.fromstring(drawn).findall("circle")
    assert len(dots) == 2
    assert all(0 < float(dot.attrib["cx"]) < 440 and 0 < float(dot.attrib["cy"]) < 220 for dot in dots)
    assert "&lt;a&gt;: estimate 0.0001" in drawn


def test_nothing_is_drawn_of_nothing() -> None:
    assert shades({"down": [None]}, unit="", axis="block", **WORDS) == ""
    assert points([("a", 0.0, 1.0)], across="", up="", **WORDS) == ""
