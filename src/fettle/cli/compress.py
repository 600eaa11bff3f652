"""`fettle compress`: a model in, a smaller one out, measured on the written files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fettle.cli.classifiers import show_compression
from fettle.cli.flags import with_flags
from fettle.cli.options import (
    AllocationChoice,
    Candidates,
    Dense,
    Device,
    Generic,
    Json,
    MethodChoice,
    Model,
    RecipeChoice,
    ReportPath,
    Threads,
)
from fettle.cli.output import console, duration, emit_json, show, size
from fettle.cli.progress import progress
from fettle.cli.quality import quality_table
from fettle.cli.recipe_choice import (
    calibration_note,
    checked_choice,
    chosen_recipe,
    command_line,
    recipe_flags,
    with_masks,
)
from fettle.cli.reshaping import reshaping_table
from fettle.errors import UsageError
from fettle.models.source import resolve
from fettle.report.tables import warning

if TYPE_CHECKING:
    from fettle.search.budget import Budget

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
Measure = Annotated[
    bool | None,
    typer.Option("--evaluate/--no-evaluate", help="Measure the written model; default: if it takes under a minute."),
]

Bits = Annotated[
    float | None,
    typer.Option(metavar="X", help="Bits a weight of the compressed linears; each gets the scheme that keeps most."),
]
Size = Annotated[str | None, typer.Option(metavar="SIZE", help="The same for the weights' files: 2GB, 750MB.")]
Free = Annotated[
    bool, typer.Option("--free-fused", help="With a budget: let query, key and value, and gate and up, differ.")
]


@with_flags(recipe_flags())
def run(
    model: Model,
    output: Output,
    recipe: RecipeChoice = None,
    method: MethodChoice = None,
    bits_per_weight: Bits = None,
    size: Size = None,
    candidate: Candidates = None,
    free_fused: Free = False,
    dense: Dense = False,
    allocation: AllocationChoice = None,
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
      fettle compress ./llama -o llama-3bit --method gptq --bits 3 --rotate
      fettle compress demo -o small --bits-per-weight 3.5
      fettle compress demo -o sparse --method sparsegpt --pattern 2:4 --bits 4
      fettle compress ./resnet-50 -o half --method prune_filters --sparsity 0.5 --images ./pictures
    """
    _refuse_beside_a_budget(bits_per_weight is not None or size is not None, candidate, free_fused, recipe or method)
    checked_choice(recipe, method, fields)
    resolve(model)  # before the imports, which take seconds
    from fettle import api
    from fettle.vision.compressing import ClassifierCompression

    budget = _budget(bits_per_weight, size, candidate, free_fused)
    chosen = with_masks(chosen_recipe(recipe, method, fields), dense=dense, allocation=allocation)
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
        budget=budget,
        report=report,
        progress=progress(json=json),
        command=command_line(sys.argv[1:]),
    )
    if json:
        emit_json(
            "compress",
            {
                "folder": made.folder,
                "report": None if isinstance(made, ClassifierCompression) else made.report_path,
                "already_finished": made.resumed_whole,
                "summary": made.summary,
            },
        )
        return
    if isinstance(made, ClassifierCompression):
        show_compression(made.summary, made.folder, made.resumed_whole)
        return
    _print(made.summary, made.folder, made.report_path, made.resumed_whole)


def _refuse_beside_a_budget(budget: bool, candidates: list[str] | None, free: bool, chosen: str | None) -> None:
    """Raises UsageError for flags of a budget without one, and for a recipe beside one."""
    if not budget and (candidates or free):
        raise UsageError("--candidate and --free-fused belong to a budget; give --bits-per-weight or --size as well")
    if budget and chosen is not None:
        raise UsageError("--bits-per-weight and --size choose the recipe; leave out --recipe and --method")


def _budget(bits: float | None, size: str | None, candidates: list[str] | None, free: bool) -> Budget | None:
    if bits is None and size is None:
        return None
    from fettle.search.budget import Budget, parse_size

    budget = Budget(
        bits_per_weight=bits, size_bytes=None if size is None else parse_size(size),
        candidates=tuple(candidates or ()), fused="free" if free else "together",
    )  # fmt: skip
    budget.validate()
    return budget


def _print(summary: dict[str, Any], folder: Path, report: Path, finished: bool) -> None:
    out = console()
    if finished:
        out.print(f"{folder} was finished already; --fresh starts over.")
    show(out, quality_table(summary))
    if summary["evaluation"] is None:
        out.print(f"Not measured. Next: fettle evaluate {folder} --reference {summary['asked']}")
    if warning(summary):
        out.print(warning(summary), style="red", markup=False)
    for step in summary.get("reshaped", ()):
        show(out, reshaping_table(step))
    base, after = summary["base"]["bytes"], summary["output"]["bytes"]
    out.print(
        f"{folder}: {size(base)} → {size(after)}, {base / after:.2f} times smaller, "
        f"in {duration(summary['seconds'])} and {size(summary['peak_memory_bytes'])} of memory"
    )
    out.print(f"Report: {report}")
