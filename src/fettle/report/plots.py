"""Plots as inline SVG: small pure functions from numbers to markup.

No script and no request: a page opens offline and prints. Colours are CSS variables of the page, so light and dark
need no second drawing. Each plot has a title and a description for screen readers, labelled axes with units, and a
`<title>` on each mark that shows its value under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44


def bars(
    values: Mapping[str, float], *, title: str, unit: str, axis: str, description: str, form: str = "{:.4g}"
) -> str:
    """Vertical bars, one a name: blocks or roles on the x axis."""
    top = _nice_ceiling(max(values.values(), default=0.0))
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step = plot_width / max(1, len(values))
    marks = []
    every = max(1, math.ceil(len(values) / 16))
    for index, (name, value) in enumerate(values.items()):
        height = plot_height * value / top if top else 0.0
        x, width = LEFT + index * step + step * 0.15, step * 0.7
        told = f"{name}: {form.format(value)} {unit}"
        marks.append(_rectangle(x, TOP + plot_height - height, width, height, told))
        if index % every == 0:
            marks.append(_text(x + width / 2, HEIGHT - BOTTOM + 16, name, anchor="middle"))
    return _frame(title, description, [*_y_axis(top, unit), *marks, _axis_label(axis)])


def histogram(edges: Sequence[float], counts: Sequence[float], *, title: str, unit: str, description: str) -> str:
    """Counts between logarithmic edges; the x axis is logarithmic, empty ends are cut off."""
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return ""
    first, last = max(filled[0], 1), filled[-1]
    shown = [sum(counts[: first + 1]), *counts[first + 1 : last + 1]]
    top = _nice_ceiling(max(shown))
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step = plot_width / len(shown)
    marks = []
    for index, count in enumerate(shown):
        height = plot_height * count / top
        low, high = edges[first + index], edges[first + index + 1]
        told = f"up to {high:.2g}" if index == 0 else f"{low:.2g} to {high:.2g}"
        x, width = LEFT + index * step + 1, max(1.0, step - 2)
        marks.append(_rectangle(x, TOP + plot_height - height, width, height, f"{told} {unit}: {count:,.0f} tokens"))
        if abs(math.log10(low) - round(math.log10(low))) < 1e-6:
            marks.append(_text(LEFT + index * step, HEIGHT - BOTTOM + 16, f"{low:.4g}", anchor="middle"))
    return _frame(title, description, [*_y_axis(top, "tokens"), *marks, _axis_label(unit)])


def _nice_ceiling(value: float) -> float:
    """The next of 1, 2, 5 · 10^n at or above a positive value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999999)


def _y_axis(top: float, unit: str) -> list[str]:
    plot_height = HEIGHT - TOP - BOTTOM
    lines = []
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + plot_height * (1 - fraction)
        kind = "axis" if fraction == 0 else "grid"
        lines.append(f'<line class="{kind}" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        lines.append(_text(LEFT - 8, y + 4, f"{fraction * top:,.4g}", anchor="end"))
    middle = TOP + plot_height / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    lines.append(f'<text class="label" x="14" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(unit)}</text>')
    return lines


def _axis_label(text: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'


def _rectangle(x: float, y: float, width: float, height: float, told: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="mark" {place}><title>{escape(told)}</title></rect>'


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(title: str, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )
