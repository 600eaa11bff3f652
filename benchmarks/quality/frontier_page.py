"""The table, the ratios and the plot of `frontier.py`, from its rows.

A ratio compares at equal or fewer bits: for a peer's result, the least KL among fettle's results (of any width) that
cost at most as many bits a weight, over the peer's KL. `SLACK` bits are forgiven: fettle's figure counts the shape
tensors of the standard's files, the peers' does not.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
SLACK = 0.02
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 980, 560, 70, 50, 40, 230
COLUMNS = (
    "width", "method", "bits/weight", "KL", "perplexity", "top-1", "bytes", "seconds", "ours/peer", "version",
)  # fmt: skip
COLOURS = ("#d1495b", "#edae49", "#00798c", "#7b2d8b", "#5b8c5a", "#3066be", "#8d6a4f", "#444444")


def best_at(rows: list[Row], bits: float) -> Row | None:
    """Fettle's result with the least KL among those of at most `bits` bits a weight."""
    fitting = [row for row in rows if row["ours"] and row["bits_per_weight"] <= bits + SLACK]
    return min(fitting, key=lambda row: row["kl_mean"], default=None)


def ratios(rows: list[Row]) -> list[Row]:
    """One entry a width: against its best peer (the least KL), and the worst of the ratios to all its peers."""
    found = []
    for width in sorted({row["width"] for row in rows}):
        peers = [row for row in rows if row["width"] == width and not row["ours"]]
        pairs = [(peer, best_at(rows, peer["bits_per_weight"])) for peer in peers]
        told = [(peer, ours, ours["kl_mean"] / peer["kl_mean"]) for peer, ours in pairs if ours is not None]
        if told:
            best = min(told, key=lambda pair: pair[0]["kl_mean"])
            worst = max(told, key=lambda pair: pair[2])
            found.append({"width": width, "best": best, "worst": worst})
    return found


def print_table(rows: list[Row]) -> None:
    """All rows with their ratios, then a line a width."""
    console = Console(width=132)
    table = Table(box=box.SIMPLE_HEAD)
    for name in (
        "width",
        "method",
        "bits/weight",
        "KL",
        "perplexity",
        "top-1",
        "bytes",
        "seconds",
        "ours/peer",
        "version",
    ):
        table.add_column(name, justify="left" if name in ("method", "version") else "right")
    for row in rows:
        ours = None if row["ours"] else best_at(rows, row["bits_per_weight"])
        ratio = f"{ours['kl_mean'] / row['kl_mean']:.3f}" if ours else ("" if row["ours"] else "none fits")
        table.add_row(
            str(row["width"]), ("fettle " if row["ours"] else "") + row["method"], f"{row['bits_per_weight']:.3f}",
            f"{row['kl_mean']:.5f}", f"{row['perplexity']:.3f}", f"{row['top1_agreement']:.4f}", f"{row['bytes']:,}",
            f"{row['seconds']:.0f}", ratio, str(row["version"]),
        )  # fmt: skip
    console.print(table)
    for entry in ratios(rows):
        for kind in ("best", "worst"):
            peer, ours, ratio = entry[kind]
            what = "ours_best_kl / best_peer_kl" if kind == "best" else "the peer that comes nearest or wins"
            print(
                f"{entry['width']} bits: {what} = {ratio:.3f}: {ours['method']} ({ours['bits_per_weight']:.3f} bits, "
                f"KL {ours['kl_mean']:.5f}) over {peer['method']} ({peer['bits_per_weight']:.3f} bits, "
                f"KL {peer['kl_mean']:.5f})"
            )


def page(rows: list[Row], model: str) -> str:
    """One HTML page with the plot, without scripts."""
    title = f"Bits a weight against KL: {model}"
    style = "body{font:14px system-ui;margin:2em}svg{max-width:100%}text{font-size:12px}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{style}</style>"
        f"<h1>{escape(title)}</h1>{plot(rows)}</html>\n"
    )


def plot(rows: list[Row]) -> str:
    """Points over bits a weight, KL on a logarithmic axis; what fettle offers at each number of bits as a line."""
    shown = [row for row in rows if row["kl_mean"] and row["kl_mean"] > 0]
    if not shown:
        return "<p>No results.</p>"
    low_x, high_x = (choose(row["bits_per_weight"] for row in shown) for choose in (min, max))
    low_x, high_x = math.floor(low_x), math.ceil(high_x)
    low, high = (choose(math.log10(row["kl_mean"]) for row in shown) for choose in (min, max))
    low, high = math.floor(low), math.ceil(high)

    def x(bits: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (bits - low_x) / max(1, high_x - low_x)

    def y(kl: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(kl)) / max(1, high - low)

    parts = _axes(range(low_x, high_x + 1), range(low, high + 1), x, y)
    groups = sorted({_series(row) for row in shown}, key=lambda name: (not name.startswith("fettle"), name))
    for row in shown:
        colour = COLOURS[groups.index(_series(row)) % len(COLOURS)]
        told = f"{row['method']}: {row['bits_per_weight']:.3f} bits, KL {row['kl_mean']:.5f}"
        mark = f'cx="{x(row["bits_per_weight"]):.1f}" cy="{y(row["kl_mean"]):.1f}" r="{6 if row["ours"] else 4.5}"'
        parts.append(f'<circle {mark} fill="{colour}" fill-opacity=".75"><title>{escape(told)}</title></circle>')
    line = [row for row in shown if row["ours"] and best_at(shown, row["bits_per_weight"] - SLACK) is row]
    line.sort(key=lambda row: row["bits_per_weight"])
    places = " ".join(f"{x(row['bits_per_weight']):.1f},{y(row['kl_mean']):.1f}" for row in line)
    parts.append(f'<polyline points="{places}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    for index, name in enumerate(groups):
        top = TOP + 20 * index
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{top}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 32}" y="{top + 4}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="KL over bits a weight">{"".join(parts)}</svg>'


def _series(row: Row) -> str:
    """Whose colour a row has."""
    method = str(row["method"])
    if "mix of a budget" in method:
        return "fettle mix, then qat" if method.endswith("then qat") else "fettle mix of a budget"
    first = method.split(" ", maxsplit=1)[0]
    return f"fettle {first}" if row["ours"] else first


def _axes(bits: range, powers: range, x: Any, y: Any) -> list[str]:
    parts = []
    for power in powers:
        height = y(10.0**power)
        parts.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for count in bits:
        parts.append(f'<path d="M{x(count):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{count}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">bits a weight, everything stored</text>')
    parts.append(f'<text x="{LEFT - 50}" y="{TOP - 18}">KL to the original, nats a token</text>')
    return parts
