"""`fettle inspect`: what a model is made of."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fettle.cli.classifiers import show_outline
from fettle.cli.options import Generic, Json
from fettle.cli.output import console, emit_json, show, size, table
from fettle.errors import UsageError

Inspected = Annotated[str | None, typer.Argument(metavar="MODEL", help="A local folder, a hub id, or demo.")]
Runtime = Annotated[bool, typer.Option("--runtime", help="Say what runs models on this machine, and why.")]


def run(model: Inspected = None, runtime: Runtime = False, generic: Generic = False, json: Json = False) -> None:
    """Show a model's anatomy: blocks, linears by role, shapes, bytes and the scheme of each. Reads headers only.

    \b
    Example:
      fettle inspect demo
      fettle inspect --runtime
    """
    if runtime:
        _show_runtime(json=json)
        return
    if model is None:
        raise UsageError("there is no model to inspect; give a folder, a hub id or demo, or --runtime for this machine")
    from fettle import api

    anatomy = api.inspect(model, generic=generic)
    if json:
        emit_json("inspect", anatomy)
        return
    if anatomy.get("kind") == "image_classifier":
        show_outline(anatomy)
        return
    out = console()
    kind = "decoder" if anatomy["causal"] else "encoder"
    tied = ", embedding and head tied" if anatomy["tied"] else ""
    out.print(
        f"{anatomy['model']}: {anatomy['family']}, {kind}, {len(anatomy['blocks'])} blocks, {anatomy['dtype']}, "
        f"{size(anatomy['bytes'])}{tied}"
    )
    columns = ("linear", "role", "shape", "bytes", "scheme")
    for title, linears in [*_alike(anatomy["blocks"]), ("outside the blocks", anatomy["outside"])]:
        if linears:
            show(out, table(title, columns, _rows(linears), right=(3,)))


def _show_runtime(*, json: bool) -> None:
    """What runs models here: the native kernels and why these, or why there are none."""
    from fettle.kernels.native import default_threads, explain_runtime, missing, plane

    absent = missing()
    if not json:
        console().print(explain_runtime(), soft_wrap=True)
        return
    features = {} if absent is not None else plane().features()
    told = {"native": absent is None, "missing": absent, "threads": default_threads(), **features}
    emit_json("inspect", {"runtime": told})


def _alike(blocks: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Blocks that follow each other and look alike share one table."""
    groups: list[tuple[list[int], list[dict[str, Any]], object]] = []
    for block in blocks:
        look = [(x["role"], x["shape"], x["bytes"], x["scheme"]) for x in block["linears"]]
        if groups and groups[-1][2] == look:
            groups[-1][0].append(block["index"])
        else:
            groups.append(([block["index"]], block["linears"], look))
    return [
        (f"block {where[0]}" if len(where) == 1 else f"blocks {where[0]} to {where[-1]}, each", linears)
        for where, linears, _ in groups
    ]


def _rows(linears: list[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    return [(x["name"], x["role"], " × ".join(map(str, x["shape"])), f"{x['bytes']:,}", x["scheme"]) for x in linears]
