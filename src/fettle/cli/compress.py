"""`fettle compress`: a model in, a smaller one out, measured on the written files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fettle import api
from fettle.cli.flags import with_flags
from fettle.cli.options import Device, Generic, Json, MethodChoice, Model, RecipeChoice, ReportPath, Threads
from fettle.cli.output import console, duration, emit_json, show, size
from fettle.cli.progress import progress
from fettle.cli.quality import quality_table
from fettle.cli.recipe_choice import calibration_note, chosen_recipe, command_line, recipe_flags

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
Measure = Annotated[
    bool | None,
    typer.Option("--evaluate/--no-evaluate", help="Measure the written model; default: if it takes under a minute."),
]


@with_flags(recipe_flags())
def run(
    model: Model,
    output: Output,
    recipe: RecipeChoice = None,
    method: MethodChoice = None,
    device: Device = "cpu",
    threads: Threads = None,
    fresh: Fresh = False,
    evaluate: Measure = None,
    generic: Generic = False,
    report: ReportPath = None,
    json: Json = False,
    **fields: Any,
) -> None:
    """Make a model smaller and write it as a standard checkpoint folder.

    The same command again resumes a run that was stopped; --fresh starts over. Beside FOLDER, FOLDER.run keeps the
    journal, the timings and report.html. Without --recipe and --method, the recipe is "default".

    \b
    Examples:
      fettle compress demo -o small --recipe gptq-4bit
      fettle compress ./llama -o llama-4bit --method gptq --bits 4 --group-size 32 --asymmetric \\
          --calibration text.txt --windows 128 --length 256 --seed 0
    """
    chosen = chosen_recipe(recipe, method, fields)
    note = calibration_note(chosen)
    if note:
        print(note, file=sys.stderr)
    made = api.compress(
        model,
        output,
        chosen,
        device=device,
        threads=threads,
        fresh=fresh,
        evaluate=evaluate,
        generic=generic,
        report=report,
        progress=progress(json=json),
        command=command_line(sys.argv[1:]),
    )
    if json:
        emit_json(
            "compress",
            {
                "folder": made.folder,
                "report": made.report_path,
                "already_finished": made.resumed_whole,
                "summary": made.summary,
            },
        )
        return
    _print(made.summary, made.folder, made.report_path, made.resumed_whole)


def _print(summary: dict[str, Any], folder: Path, report: Path, finished: bool) -> None:
    out = console()
    if finished:
        out.print(f"{folder} was finished already; --fresh starts over.")
    show(out, quality_table(summary))
    if summary["evaluation"] is None:
        out.print(f"Not measured. Next: fettle evaluate {folder} --reference {summary['asked']}")
    base, after = summary["base"]["bytes"], summary["output"]["bytes"]
    out.print(
        f"{folder}: {size(base)} → {size(after)}, {base / after:.2f} times smaller, "
        f"in {duration(summary['seconds'])} and {size(summary['peak_memory_bytes'])} of memory"
    )
    out.print(f"Report: {report}")
