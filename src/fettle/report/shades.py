"""Plots of two-sided data as inline SVG: a table of shades, and points on logarithmic axes. See plots.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from fettle.report.plots import BOTTOM, HEIGHT, LEFT, LETTER, RIGHT, TOP, WIDTH, axis_label, frame, letters, rectangle

CELL = 22
POWERS = 8  # names of powers that fit beside each other
MARGIN = 0.04  # of a logarithmic axis, on either side


def shades(
    values: Mapping[str, Sequence[float | None]], *, title: str, unit: str, axis: str, description: str,
    logarithmic: bool = True,
) -> str:  # fmt: skip
    """A table of shaded cells: a row a name, columns 0, 1, 2 …; darker is larger. Cells without a value stay empty."""
    known = [v for row in values.values() for v in row if v is not None and math.isfinite(v)]
    if not known:
        return ""
    left = max(len(name) for name in values) * LETTER + 12
    columns = max(len(row) for row in values.values())
    step = (WIDTH - left - RIGHT) / max(1, columns)
    parts: list[str] = []
    for number, (name, row) in enumerate(values.items()):
        y = 4 + number * CELL
        parts.append(letters(left - 8, y + 15, name, anchor="end"))
        for index, value in enumerate(row):
            if value is not None and math.isfinite(value):
                strength = 0.06 + 0.94 * _position(value, known, logarithmic)
                told = f"{name}, {axis} {index}: {value:.3g} {unit}"
                cell = rectangle(left + index * step, y, max(1.0, step - 1.5), CELL - 1.5, told)
                parts.append(f'<g fill-opacity="{strength:.2f}">{cell}</g>')
    bottom = 4 + len(values) * CELL
    every = max(1, math.ceil(columns / 16))
    parts += [
        letters(left + (index + 0.5) * step, bottom + 14, str(index), anchor="middle")
        for index in range(columns)
        if index % every == 0
    ]
    told = f"{axis}; shades from {min(known):.2g} to {max(known):.2g} {unit}"
    parts.append(axis_label(told, y=bottom + 32, left=left, right=RIGHT))
    return frame(title, description, parts, height=bottom + 40)


def points(
    pairs: Sequence[tuple[str, float, float]], *, title: str, across: str, up: str, description: str,
    same_unit: bool = True,
) -> str:  # fmt: skip
    """Named points on two logarithmic axes; of the same unit, both have one range and a line where they are equal."""
    shown = [(name, x, y) for name, x, y in pairs if x > 0 and y > 0 and math.isfinite(x) and math.isfinite(y)]
    if not shown:
        return ""
    across_values, up_values = [x for _, x, _ in shown], [y for _, _, y in shown]
    both = across_values + up_values
    range_x, range_y = (_range(both if same_unit else values) for values in (across_values, up_values))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place_x(value: float) -> float:
        return LEFT + width * (math.log10(value) - range_x[0]) / (range_x[1] - range_x[0])

    def place_y(value: float) -> float:
        return TOP + height * (range_y[1] - math.log10(value)) / (range_y[1] - range_y[0])

    parts = []
    for power in _powers(range_y):
        y = place_y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(letters(LEFT - 8, y + 4, f"1e{power}", anchor="end"))
    for power in _powers(range_x):
        x = place_x(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + height}"/>')
        parts.append(letters(x, HEIGHT - BOTTOM + 16, f"1e{power}", anchor="middle"))
    if same_unit:
        parts.append(f'<line class="axis" x1="{LEFT}" y1="{TOP + height}" x2="{WIDTH - RIGHT}" y2="{TOP}"/>')
    for name, x_value, y_value in shown:
        x, y = place_x(x_value), place_y(y_value)
        told = escape(f"{name}: {across} {x_value:.3g}, {up} {y_value:.3g}")
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{told}</title></circle>')
    middle = TOP + height / 2
    turned = f'transform="rotate(-90 12 {middle:.0f})"'
    parts.append(f'<text x="12" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(up)}</text>')
    return frame(title, description, [*parts, axis_label(across)])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten at the ends of an axis that shows these values, with a margin."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = MARGIN * (high - low) + 0.05
    return low - margin, high + margin


def _powers(ends: tuple[float, float]) -> range:
    """The powers of ten that get a line: every one, or every second where there are many."""
    low, high = math.ceil(ends[0]), math.floor(ends[1])
    return range(low, high + 1, 1 if high - low < POWERS else 2)


def _position(value: float, known: Sequence[float], logarithmic: bool) -> float:
    """Where a value lies between the smallest and the largest, 0 to 1."""
    low, high = min(known), max(known)
    if logarithmic and low > 0:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5
