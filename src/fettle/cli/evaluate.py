"""`fettle evaluate`: what a written model is worth, alone or against its original; a gate for scripts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fettle.cli.classifiers import show_evaluation
from fettle.cli.options import Device, Generic, Json, Model, NoReport, Threads, chosen_page, page_note
from fettle.cli.output import console, emit_json, number, show, table
from fettle.cli.progress import progress
from fettle.cli.quality import evaluation_table
from fettle.cli.recipe_choice import command_line
from fettle.errors import FettleError, UsageError
from fettle.evaluate.result import check_gate
from fettle.models.source import resolve
from fettle.report.atomic import require_writable
from fettle.report.page import write_report

if TYPE_CHECKING:
    from fettle.vision.evaluation import ClassifierEvaluation

Reference = Annotated[str | None, typer.Option(metavar="BASE", help="The original model, to measure what was lost.")]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text; without it the embedded held-out text.")]
Images = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|FILE", help="For image classifiers; without it the embedded images (shapes)."),
]
Length = Annotated[int, typer.Option(metavar="N", help="Tokens a window, its first being BOS.", min=2)]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Use only the start of the text.", min=2)]
MaxKl = Annotated[float | None, typer.Option(metavar="X", help="Fail with exit code 5 if the mean KL is above X.")]
PagePath = Annotated[
    Path | None,
    typer.Option("--report", metavar="PATH", help="Where the page goes; without it report.html, in this folder."),
]

PAGE = Path("report.html")


def run(
    model: Model,
    reference: Reference = None,
    text: Text = None,
    images: Images = None,
    length: Length = 512,
    max_tokens: MaxTokens = None,
    max_kl: MaxKl = None,
    device: Device = "cpu",
    threads: Threads = None,
    generic: Generic = False,
    report: PagePath = None,
    no_report: NoReport = False,
    json: Json = False,
) -> None:
    """Measure the files of a model: perplexity with its standard error, bits a byte, and against --reference the KL
    divergence, the agreement and the worst tokens.

    Writes one file besides: report.html, into the current folder. --report PATH puts it elsewhere, --no-report writes
    none.

    \b
    Examples:
      fettle evaluate small --reference demo
      fettle evaluate small --reference demo --text held_out.txt --max-kl 0.05 --json
      fettle evaluate half --reference ./resnet-50 --images ./pictures
    """
    _check_gate_flags(max_kl, reference)
    page, folder = chosen_page(report, no_report, PAGE), resolve(model)  # before the imports, which take seconds
    from fettle import api
    from fettle.vision.classifier import is_image_classifier
    from fettle.vision.evaluation import ClassifierEvaluation

    classifies = is_image_classifier(folder)
    if classifies:
        page = _no_page(report)
    if page is not None:
        require_writable(page)
    if text is None and not classifies:
        print("No --text given: the embedded held-out text (Python source code) is measured.", file=sys.stderr)
    measured = api.evaluate(
        model,
        reference=reference,
        text=text,
        images=images,
        length=length,
        max_tokens=max_tokens,
        device=device,
        threads=threads,
        generic=generic,
        progress=progress(json=json),
    )
    found, command, failed = measured.to_json(), command_line(sys.argv[1:]), None
    if isinstance(measured, ClassifierEvaluation):
        _classifier(measured, {"model": model, "reference": reference, "command_line": command}, max_kl, json=json)
        return
    if page is not None:
        result = {"schema": 1, "kind": "evaluation", "model": model, "reference": reference, "command": command}
        try:
            write_report(page, [{**result, "evaluation": found}])
        except FettleError as error:  # the numbers took minutes: they are shown whatever becomes of the page
            failed, page = error, None
    if json:
        named = {"model": model, "reference": reference, "command_line": command}
        emit_json("evaluate", {**named, **found, "report": page})
    else:
        _print(found, page)
    if max_kl is not None:
        check_gate(measured, max_kl)
    if failed is not None:
        raise failed


def _check_gate_flags(max_kl: float | None, reference: str | None) -> None:
    if max_kl is not None and reference is None:
        raise UsageError("--max-kl needs --reference: a KL divergence is measured against the original")
    if max_kl is not None and not max_kl >= 0:
        raise UsageError(f"--max-kl {max_kl}; it must be 0 or more, in nats a token")


def _no_page(report: Path | None) -> Path | None:
    """The page of an image classifier: none; raises UsageError where one is asked for."""
    if report is not None:
        raise UsageError("an image classifier has no page yet; leave out --report, and see --json")
    return report


def _classifier(measured: ClassifierEvaluation, named: Mapping[str, Any], max_kl: float | None, *, json: bool) -> None:
    """What is said of an image classifier, which has no page."""
    if json:
        emit_json("evaluate", {**named, **measured.to_json(), "report": None})
    else:
        show_evaluation(measured.to_json())
    if max_kl is not None:
        check_gate(measured, max_kl, unit="an image", advice="prune less, in more rounds, or heal longer")


def _print(found: Mapping[str, Any], page: Path | None) -> None:
    out = console()
    show(out, evaluation_table(found))
    worst = found.get("worst_tokens") or []
    if worst:
        show(out, worst_table(worst))
    if page is not None:
        out.print(page_note(page, PAGE), markup=False)


def worst_table(worst: list[dict[str, Any]]) -> Any:
    """The tokens that lost most, in their context."""
    rows = [
        (number(x["kl"]), _visible(x["context"])[-48:], _visible(x["token"]), _visible(x["predicted"]))
        for x in worst[:8]
    ]
    return table("worst tokens", ("KL", "after the text", "right", "predicted now"), rows, right=(0,))


def _visible(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("[", "\\[")
