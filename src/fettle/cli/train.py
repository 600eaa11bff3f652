"""`fettle train`: distillation, healing, quantization-aware training and adapters; alone or as a chain of stages."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fettle.cli import outlines
from fettle.cli.compress import Fresh, Output
from fettle.cli.flags import flag_name, method_fields, method_flags, with_flags
from fettle.cli.options import Device, Generic, Json, Model, ReportPath, Threads
from fettle.cli.output import console, duration, emit_json, show, size
from fettle.cli.progress import progress
from fettle.cli.quality import quality_table
from fettle.cli.recipe_choice import command_line
from fettle.errors import UsageError, unknown_word
from fettle.methods.field_values import require_possible
from fettle.models.source import resolve
from fettle.report.tables import warning

if TYPE_CHECKING:
    from fettle import api
    from fettle.pipeline.chain import Chain

TRAIN_METHODS = outlines.train_methods()

ChainChoice = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME|FILE", help="A shipped chain's name, or a YAML file of stages.")
]
Method = Annotated[str | None, typer.Option("--method", metavar="NAME", help=f"One stage: {', '.join(TRAIN_METHODS)}.")]
Measure = Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Measure the written model against MODEL.")]

JudgingText = Annotated[
    str | None, typer.Option("--judge", metavar="FILE", help="UTF-8 text to measure on; none for the held-out one.")
]


@with_flags(method_flags(TRAIN_METHODS))
def run(
    model: Model,
    output: Output,
    recipe: ChainChoice = None,
    method: Method = None,
    device: Device = "cpu",
    threads: Threads = None,
    fresh: Fresh = False,
    evaluate: Measure = True,
    judge: JudgingText = None,
    generic: Generic = False,
    report: ReportPath = None,
    json: Json = False,
    **fields: Any,
) -> None:
    """Train a model: heal it by distillation, train its codes, or train an adapter beside it.

    The same command again resumes a run that was stopped; --fresh starts over. MODEL is the teacher unless --teacher
    names another. Several processes: torchrun --nproc-per-node N -m fettle train …, each with the whole model, or with
    a part of it (--shard).

    \b
    Examples:
      fettle train demo -o two-bits --recipe qat-2bit
      fettle train pruned -o healed --method distill --teacher demo --steps 200 --keep-zeros
      fettle train small -o adapter --method adapter --kind lora --rank 8 --text mine.txt --steps 100
    """
    values = _checked(recipe, method, fields)
    resolve(model)  # before the imports, which take seconds
    from fettle import api

    made = api.train(
        model,
        output,
        _chosen(recipe, method, values),
        device=device,
        threads=threads,
        fresh=fresh,
        evaluate=evaluate,
        judge=judge,
        generic=generic,
        report=report,
        progress=progress(json=json),
        command=command_line(sys.argv[1:]),
    )
    if json:
        emit_json("train", {"folder": made.folder, "report": made.report_path, "summary": made.summary})
        return
    _print(made)


def _checked(recipe: str | None, method: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the method that were given, as far as names, types and bounds go.

    Raises:
        UsageError: neither or both of --recipe and --method, a flag that the method does not have, or its value.
    """
    if (recipe is None) == (method is None):
        raise UsageError("give one of --recipe NAME|FILE and --method NAME; fettle methods lists the training methods")
    if method is None:
        given = [f"--{flag_name(name)}" for name, value in fields.items() if value is not None]
        if given:
            raise UsageError(f"{', '.join(given)} belongs to a method; the recipe {recipe} says that itself, by stage")
        return {}
    if method not in TRAIN_METHODS:
        raise UsageError(unknown_word("training method", method, TRAIN_METHODS))
    values = method_fields(TRAIN_METHODS, method, fields)
    require_possible(TRAIN_METHODS[method], values)
    return values


def _chosen(recipe: str | None, method: str | None, values: dict[str, Any]) -> Chain:
    """The chain that the checked flags mean."""
    from fettle.pipeline.chain import chain_from_method, load_chain

    return load_chain(str(recipe)) if method is None else chain_from_method(method, values)


def _print(made: api.Training) -> None:
    out, summary = console(), made.summary
    for line in summary["stages"]:
        curve = line["curve"]
        told = (
            ""
            if curve is None
            else f", {len(curve['losses'])} steps, loss {curve['losses'][0]:.4f} → {curve['losses'][-1]:.4f}"
        )
        if curve is not None and curve["stopped"]:
            told += f"; stopped: {curve['stopped']}"
        if curve is not None and curve.get("answer_bytes"):
            told += f"; the teacher's answers: {size(curve['answer_bytes'])} on disk"
        lost = line.get("against_input") or {}
        if lost.get("kl_mean") is not None:
            told += f"; KL to what it read: {lost['kl_mean']:.5f} nats"
        student = line.get("student")
        if student:
            why = f", {student['map']} " + " ".join(f"{score:.4f}" for score in student["scores"])
            out.print(
                f"{line['name']}: blocks {', '.join(map(str, student['kept']))} of {student['blocks']}"
                f"{why if student['scores'] else ', ' + student['map']}",
                markup=False,
            )
        if line.get("signals"):
            learned_from = ", ".join(f"{signal} {weight:g}" for signal, weight in line["signals"].items())
            out.print(f"{line['name']}: learned from {learned_from}", markup=False)
        out.print(f"{line['name']}: {duration(line['seconds'])}{told}", markup=False)
    if summary["evaluation"] is not None:
        show(out, quality_table(summary))
        if warning(summary):
            out.print(warning(summary), style="red", markup=False)
    out.print(f"{made.folder}: {size(summary['output']['bytes'])}")
    out.print(f"Report: {made.report_path}")
