"""`fettle demo`: the whole main job on the model that comes with fettle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fettle.cli.options import Device, Json, RecipeChoice, ReportPath, Threads
from fettle.cli.output import console, emit_json, show, size
from fettle.cli.progress import progress
from fettle.cli.quality import quality_table
from fettle.cli.recipe_choice import DEFAULT_RECIPE, command_line

Folder = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")]
Prompt = Annotated[str, typer.Option(metavar="TEXT", help="What both models complete.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]

PROMPT = "def main(argv=None):"


def run(
    output: Folder = Path("demo-out"),
    recipe: RecipeChoice = None,
    prompt: Prompt = PROMPT,
    device: Device = "cpu",
    threads: Threads = None,
    fresh: Fresh = False,
    report: ReportPath = Path("report.html"),
    json: Json = False,
) -> None:
    """Compress the embedded model, reload what was written, compare it with the original, and write report.html.

    \b
    Example:
      fettle demo -o demo-out
    """
    from fettle import api

    chosen = recipe or DEFAULT_RECIPE
    print(f"Compressing the embedded model with the recipe {chosen}.", file=sys.stderr)
    made = api.compress(
        "demo",
        output,
        chosen,
        device=device,
        threads=threads,
        fresh=fresh,
        evaluate=True,
        report=report,
        progress=progress(json=json),
        command=command_line(sys.argv[1:]),
        prompt=prompt,
    )
    assert isinstance(made, api.Compression)  # the demo is a language model
    if json:
        emit_json("demo", {"folder": made.folder, "report": made.report_path, "summary": made.summary})
        return
    _print(made.summary, made.folder, made.report_path, made.resumed_whole)


def _print(summary: dict[str, Any], folder: Path, report: Path, finished: bool) -> None:
    out = console()
    if finished:
        out.print(f"{folder} was finished already; --fresh starts over.")
    show(out, quality_table(summary))
    for pair in summary["completions"]:
        for name in ("original", "compressed"):
            out.rule(f"{name}, after the same prompt", align="left")
            out.print(pair["prompt"], style="dim", end="", markup=False)
            out.print(pair[name], markup=False)
    base, after = summary["base"]["bytes"], summary["output"]["bytes"]
    out.print()
    out.print(f"{size(base)} → {size(after)}. The model is in {folder}, the page in {report}.")
    out.print(f'Next: fettle generate {folder} "import os"', markup=False)
