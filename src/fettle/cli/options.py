"""The options that several verbs share, each declared once so that it is spelled and explained alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.engine.names import ENGINE_NAMES
from fettle.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a hub id, or demo.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Processor threads; the bytes do not depend on it.", min=1)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
Generic = Annotated[bool, typer.Option("--generic", help="Unknown family: treat every linear layer alike.")]
RecipeChoice = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME|FILE", help="A shipped recipe's name, or a YAML file.")
]
MethodChoice = Annotated[
    str | None, typer.Option("--method", metavar="NAME", help="One method for every linear, instead of a recipe.")
]
Dense = Annotated[
    bool, typer.Option("--dense", help="Write pruned weights out with their zeros, for loaders that know no masks.")
]
AllocationChoice = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        metavar="uniform|global|sensitivity|outliers",
        help="How a pruning method's sparsity is spread over the linears; default uniform.",
    ),
]
ReportPath = Annotated[Path | None, typer.Option("--report", metavar="PATH", help="Where the HTML page goes.")]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="NAME", help=f"What runs the model: {', '.join(ENGINE_NAMES)}.")
]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write no HTML page.")]
Candidates = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate", metavar="TEXT", help='A method with its fields, "gptq bits=3 group_size=64"; give several.'
    ),
]


def chosen_page(report: Path | None, no_report: bool, default: Path) -> Path | None:
    """Where a verb that looks at a model writes its page; None: nowhere.

    Raises:
        UsageError: --report and --no-report together.
    """
    if no_report and report is not None:
        raise UsageError("--report and --no-report exclude each other; give one of them")
    return None if no_report else report or default


def page_note(page: Path, default: Path) -> str:
    """The line that says where the page is, and how to have it otherwise where nobody asked for it."""
    unasked = " (in this folder; --report PATH puts it elsewhere, --no-report writes none)" if page == default else ""
    return f"Report: {page}{unasked}"
