"""Plots as inline SVG: small pure functions from numbers to markup.

No script and no request: a page opens offline and prints. Colours are CSS variables of the page, so light and dark
need no second drawing. Each plot has a title and a description for screen readers, labelled axes with units, and a
`<title>` on each mark that shows its value under the pointer. The drawing is about as wide as the column that it stands
in, so that its letters keep the size of the page's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 62, 8, 12, 46
LETTER = 6.6  # width of a letter at 12 px, about
ROW, NAME_LETTERS = 24, 30
TICKS = 8  # names that fit beside each other on the x axis
SERIES = 6  # line styles that the page knows


def bars(values: Sequence[float], *, title: str, unit: str, axis: str, description: str) -> str:
    """Vertical bars over 0, 1, 2 …, one a value: blocks on the x axis."""
    top = nice_ceiling(max(values, default=0.0))
    step = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    marks = []
    for index, value in enumerate(values):
        height = _height(value, top)
        told = f"{axis} {index}: {value:.4g} {unit}"
        marks.append(rectangle(LEFT + index * step + step * 0.14, _y(value, top), step * 0.72, height, told))
    centres = [(index, LEFT + (index + 0.5) * step) for index in range(len(values))]
    return frame(title, description, [*_y_axis(top, unit), *marks, *_ticks(centres), axis_label(axis)])


def rows(values: Mapping[str, float], *, title: str, unit: str, description: str) -> str:
    """Horizontal bars with name and value, one a line: for names that do not fit under each other's bars."""
    if not values:
        return ""
    names = {name: name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…" for name in values}
    left = max(len(name) for name in names.values()) * LETTER + 10
    numbers = {name: f"{value:.3g}" for name, value in values.items()}
    right = max(len(number) for number in numbers.values()) * LETTER + 10
    largest = max(values.values())
    scale = (WIDTH - left - right) / largest if largest > 0 else 0.0
    parts = []
    for index, (name, value) in enumerate(values.items()):
        y = 4 + index * ROW
        parts.append(letters(left - 8, y + 15, names[name], anchor="end"))
        parts.append(rectangle(left, y + 4, value * scale, ROW - 9, f"{name}: {value:.4g} {unit}"))
        parts.append(letters(left + value * scale + 6, y + 15, numbers[name], anchor="start", kind="value"))
    bottom = 4 + len(values) * ROW
    parts.append(f'<line class="axis" x1="{left:.1f}" y1="4" x2="{left:.1f}" y2="{bottom}"/>')
    parts.append(axis_label(unit, y=bottom + 20, left=left, right=right))
    return frame(title, description, parts, height=bottom + 28)


def lines(series: Mapping[str, Sequence[float]], *, title: str, unit: str, axis: str, description: str) -> str:
    """Values over 0, 1, 2 …, one line a name, with a legend; the page styles the first six differently."""
    top = nice_ceiling(max((max(values) for values in series.values() if values), default=0.0))
    longest = max((len(values) for values in series.values()), default=0)
    step = (WIDTH - LEFT - RIGHT) / max(1, longest)
    parts = _y_axis(top, unit)
    parts += _ticks([(index, LEFT + (index + 0.5) * step) for index in range(longest)])
    parts.append(axis_label(axis))
    for number, (name, values) in enumerate(series.items()):
        points = [(LEFT + (index + 0.5) * step, _y(value, top)) for index, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = f"line line{number % SERIES}"
        told = escape(f"{name}, last {axis}: {values[-1]:.4g} {unit}" if values else name)
        parts.append(f'<polyline class="{kind}" points="{path}"><title>{told}</title></polyline>')
        y = HEIGHT + 10 + number * 18
        parts.append(f'<line class="{kind}" x1="{LEFT}" y1="{y - 4}" x2="{LEFT + 26}" y2="{y - 4}"/>')
        parts.append(letters(LEFT + 34, y, name if len(name) < 52 else name[:51] + "…", anchor="start"))
    return frame(title, description, parts, height=HEIGHT + 18 * len(series))


def histogram(edges: Sequence[float], counts: Sequence[float], *, title: str, unit: str, description: str) -> str:
    """Counts between logarithmic edges; the x axis is logarithmic, empty ends are cut off."""
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return ""
    first, last = max(filled[0], 1), max(filled[-1], 1)
    shown = [sum(counts[: first + 1]), *counts[first + 1 : last + 1]]
    top = nice_ceiling(max(shown))
    step = (WIDTH - LEFT - RIGHT) / len(shown)
    marks = []
    for index, count in enumerate(shown):
        low, high = edges[first + index], edges[first + index + 1]
        told = f"up to {high:.2g}" if index == 0 else f"{low:.2g} to {high:.2g}"
        x, width = LEFT + index * step + 0.75, max(1.0, step - 1.5)
        marks.append(rectangle(x, _y(count, top), width, _height(count, top), f"{told} {unit}: {count:,.0f} tokens"))
        if abs(math.log10(low) - round(math.log10(low))) < 1e-6:
            marks.append(letters(LEFT + index * step, HEIGHT - BOTTOM + 16, f"{low:.4g}", anchor="middle"))
    return frame(title, description, [*_y_axis(top, "tokens"), *marks, axis_label(f"{unit}, logarithmic")])


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 · 10^n at or above a positive value: four equal steps have short names."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value * 0.999999)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - _height(value, top)


def _height(value: float, top: float) -> float:
    return (HEIGHT - TOP - BOTTOM) * value / top


def _ticks(places: Sequence[tuple[int, float]]) -> list[str]:
    """Numbers under the x axis, as many as fit, at equal distances."""
    every = max(1, math.ceil(len(places) / (2 * TICKS)))
    return [letters(x, HEIGHT - BOTTOM + 16, str(index), anchor="middle") for index, x in places if index % every == 0]


def _y_axis(top: float, unit: str) -> list[str]:
    parts = []
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        y = _y(fraction * top, top)
        kind = "axis" if fraction == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(letters(LEFT - 8, y + 4, f"{fraction * top:,.4g}", anchor="end"))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = f'transform="rotate(-90 12 {middle:.0f})"'
    parts.append(f'<text x="12" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(unit)}</text>')
    return parts


def axis_label(words: str, *, y: float = HEIGHT - 8, left: float = LEFT, right: float = RIGHT) -> str:
    """What the x axis measures, under its middle."""
    return letters((left + WIDTH - right) / 2, y, words, anchor="middle")


def rectangle(x: float, y: float, width: float, height: float, told: str) -> str:
    """A mark that tells its value under the pointer."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="mark" {place}><title>{escape(told)}</title></rect>'


def letters(x: float, y: float, text: str, *, anchor: str, kind: str = "") -> str:
    """Words at a place, escaped."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def frame(title: str, description: str, parts: Sequence[str], *, height: float = HEIGHT) -> str:
    """The drawing around its parts, with title and description for screen readers."""
    label = escape(f"{title}. {description}")
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )
