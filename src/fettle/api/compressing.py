"""`compress`: from a model and a recipe or a budget to a written, measured, documented folder, and its page."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from fettle.api.questions import evaluate_language_model as measure_folder
from fettle.api.questions import generate
from fettle.data.tokenizer import has_tokenizer
from fettle.data.windows import evaluation_windows, read_text
from fettle.engine.prompts import checked_prompt
from fettle.errors import UsageError
from fettle.evaluate.apart import beside
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.result import Evaluation
from fettle.evaluate.streaming import evaluate as evaluate_streaming
from fettle.models.checkpoint import INDEX
from fettle.models.config_file import context_length
from fettle.models.source import resolve
from fettle.models.writer import write_json, write_text
from fettle.pipeline.card import model_card
from fettle.pipeline.journal import Journal, run_folder
from fettle.pipeline.recipe import Recipe, load_recipe
from fettle.pipeline.reshaping import tokenizer_of
from fettle.pipeline.run import (
    MARKER,
    Run,
    marker,
    monotonic_seconds,
    prepare,
    refuse_inside,
    stop_on_signals,
    write_model,
)
from fettle.pipeline.summary import read_summary, summarize
from fettle.progress import Progress, Silent
from fettle.report.atomic import require_writable
from fettle.report.page import write_report
from fettle.search.allocation import allocated
from fettle.search.budget import Budget
from fettle.search.choose import Choice, choose, probe_run
from fettle.vision.classifier import is_image_classifier
from fettle.vision.compressing import ClassifierCompression, compress_classifier

EVALUATION_TOKENS = 16_384  # what `compress` measures itself on
AFFORDABLE_FLOPS = 2e12  # and the work up to which it does so unasked: under a minute on two cores
UNSTABLE_RESULTS = ("seconds", "peak_memory_bytes", "versions")  # differ from run to run, so not in the written model


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What `compress` did: the written folder, its measurement (None where it was left out), and the whole summary."""

    folder: Path
    evaluation: Evaluation | None
    summary: dict[str, Any]
    report_path: Path
    resumed_whole: bool = False  # nothing was done: the run was finished already


class Machine(TypedDict):
    """Where a run works, and whether it takes an unknown architecture for linears alone."""

    device: str
    threads: int | None
    generic: bool


def compress(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | str | Path = "default",
    *,
    device: str = "cpu",
    threads: int | None = None,
    fresh: bool = False,
    evaluate: bool | None = None,
    generic: bool = False,
    budget: Budget | None = None,
    report: str | Path | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    prompt: str | None = None,
) -> Compression | ClassifierCompression:
    """Compresses a model into a standard checkpoint folder, measures what was written, and writes card and page.

    A run that was killed goes on where it stopped when it is called again with the same arguments, and writes the same
    bytes as an undisturbed one. An image classifier (`methods/filters`) gives a `ClassifierCompression`, and no page.

    Args:
        model: a local folder, a hub id, or "demo".
        output: the folder to write; beside it, `OUTPUT.run/` keeps the journal, the timings and the page.
        recipe: a Recipe, a YAML file, or the name of a shipped recipe.
        device: "cpu", "cuda" or "cuda:N".
        threads: how many to use; the result does not depend on it.
        fresh: start over instead of resuming.
        evaluate: measure the written files; None: where that takes under about a minute.
        generic: treat every linear of an unknown architecture alike.
        budget: how small it has to be; each linear then gets the scheme with which the whole keeps most, and only the
            calibration of `recipe` is used, and its rotation.
        report: where the page goes; None: `OUTPUT.run/report.html`.
        progress: told how far it is.
        command: the command that reproduces this, for the page.
        prompt: let both models complete this, for the page.

    Raises:
        UsageError, ModelError, ResourceError, InterruptedRunError: see `fettle.errors`.
    """
    progress, output, started = progress or Silent(), Path(output), time.monotonic()
    restart_peak()
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if is_image_classifier(resolve(model)):
        _refuse_for_classifiers(budget=budget, prompt=prompt, report=report)
        with stop_on_signals(output):
            return compress_classifier(
                model, output, chosen, device=device, fresh=fresh, evaluate=evaluate, progress=progress,
                command=command or "",
            )  # fmt: skip
    if report is not None:
        require_writable(Path(report))
    with stop_on_signals(output):
        where = Machine(device=device, threads=threads, generic=generic)
        chosen = allocated(model, chosen, **where, progress=progress)
        choice = None if budget is None else _chosen(model, output, budget, chosen, where, fresh, progress)
        run = prepare(model, chosen if choice is None else choice.recipe, **where)
        refuse_inside(run.checkpoint.folder, output)
        _refuse_what_would_fail_later(run, evaluate, prompt)
        with Journal.open(output, run.identity, fresh=fresh) as journal:
            summary_path = run_folder(output) / "summary.json"
            report_path = Path(report) if report is not None else run_folder(output) / "report.html"
            before = _finished(run, output, journal, summary_path)
            summary = copy.deepcopy(before) or _compressed(run, output, journal, progress, started)
            summary.setdefault("command", command or "")  # the library cannot know of one that does the same
            if summary["evaluation"] is None and (evaluate or before is None) and _is_measured(run, evaluate):
                summary["evaluation"] = _measure(run, output, progress)
            if prompt is not None and [pair["prompt"] for pair in summary["completions"]] != [prompt]:
                summary["completions"] = _completions(run, output, prompt)
            if choice is not None:
                _note_budget_(summary, run, output, choice)
            evaluation = Evaluation.from_json(summary["evaluation"]) if summary["evaluation"] else None
            _write_page(summary, report_path)
            if summary != before:
                write_json(summary_path, summary)
                _write_card_and_marker(run, output, journal, evaluation)
    return Compression(
        folder=output, evaluation=evaluation, summary=summary, report_path=report_path, resumed_whole=before is not None
    )


def _note_budget_(summary: dict[str, Any], run: Run, output: Path, choice: Choice) -> None:
    """What the budget predicted and, once the files were measured, what they cost on the same sample."""
    summary["budget"] = summary.get("budget") or {**choice.figures, "written_kl": None}
    if summary["evaluation"] and summary["budget"]["written_kl"] is None:
        summary["budget"]["written_kl"] = _sample_kl(run, output, choice)


def _refuse_for_classifiers(**given: object) -> None:
    """Raises UsageError for what only language models have."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} is for language models, and this is an image classifier; leave it out")


def _finished(run: Run, output: Path, journal: Journal, summary_path: Path) -> dict[str, Any] | None:
    """The summary of a run that left nothing to do; None where something is missing."""
    if not all(_is_json(path) for path in (output / MARKER, output / "config.json", output / INDEX)):
        return None
    if len(journal.records(output)) < len(run.layout.units) or not summary_path.exists():
        return None
    return read_summary(summary_path)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _compressed(run: Run, output: Path, journal: Journal, progress: Progress, started: float) -> dict[str, Any]:
    """Writes what is missing of the model; returns the summary, not measured yet."""
    earlier = sum(record.seconds for record in journal.records(output))  # what a stopped run spent already
    write_model(run, output, journal, progress)
    return {
        **summarize(run, output, journal),
        "seconds": earlier + monotonic_seconds(started),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _chosen(
    model: str | Path, output: Path, budget: Budget, recipe: Recipe, where: Machine, fresh: bool, progress: Progress
) -> Choice:
    """The mix that keeps most within the budget, on the recipe's calibration and rotation."""
    _refuse_two_budgets(recipe)
    probe = probe_run(model, budget, recipe.calibration, **where, basis=recipe.basis)
    refuse_inside(probe.checkpoint.folder, output)
    return choose(probe, output, budget, fresh=fresh, progress=progress)


def _refuse_two_budgets(recipe: Recipe) -> None:
    """Raises UsageError for another shape beside a budget of bits: neither would know what the other takes."""
    if recipe.reshaping:
        raise UsageError(
            f"a budget gives each linear a scheme, and {recipe.name} gives the model another shape first; do one after "
            "the other: write the reshaped model, then compress that folder to the budget"
        )


def _refuse_what_would_fail_later(run: Run, evaluate: bool | None, prompt: str | None) -> None:
    """Raises UsageError, naming the base, for a measurement or a completion that cannot be: before hours of work."""
    anatomy = run.anatomy
    if prompt is not None:
        if anatomy.causal and anatomy.head is None and not run.identity["generic"]:
            raise UsageError(f"{run.asked} has no language-model head: it cannot complete a prompt; leave it out")
        context = context_length(run.checkpoint.config)
        checked_prompt(run.asked, anatomy, tokenizer_of(run.checkpoint), context, prompt)
    if not _is_measured(run, evaluate):
        return
    tokenizer = tokenizer_of(run.checkpoint)
    if tokenizer is None or anatomy.embedding is None:
        lack = "tokenizer files" if tokenizer is None else "embedding that fettle can find"
        raise UsageError(
            f"{run.asked} has no {lack}, and a model is measured on a text's tokens; give a base that has, or use "
            "--no-evaluate"
        )
    text = read_text(None, variant="heldout")
    ids = torch.cat(evaluation_windows(tokenizer, text, length=_length(run), max_tokens=EVALUATION_TOKENS).ids)
    try:
        anatomy.require_rows(int(ids.min()), int(ids.max()))
    except UsageError as error:
        raise UsageError(f"{run.asked} cannot be measured: {error} Use --no-evaluate") from error


def _is_measured(run: Run, wanted: bool | None) -> bool:
    """Whether `compress` measures what it wrote: as asked, and unasked where it can and takes under about a minute."""
    if wanted is not None:
        return wanted
    if not has_tokenizer(run.checkpoint.folder) or run.anatomy.embedding is None:
        return False
    parameters = sum(math.prod(entry.shape) for entry in run.checkpoint.entries.values())
    return 2 * 2 * parameters * EVALUATION_TOKENS <= AFFORDABLE_FLOPS


def _length(run: Run) -> int:
    return min(512, context_length(run.checkpoint.config) or 512)


def _measure(run: Run, output: Path, progress: Progress) -> dict[str, Any]:
    if any("used" in step for step in run.reshaped):  # the tokens of the two are not the same
        return _measure_apart(run, output, progress)
    measured = measure_folder(
        output, reference=run.checkpoint.folder, length=_length(run), max_tokens=EVALUATION_TOKENS, device=run.device,
        threads=run.workers.threads, generic=run.identity["generic"], reshaped=bool(run.reshaped), progress=progress,
    )  # fmt: skip
    return measured.to_json()


def _measure_apart(run: Run, output: Path, progress: Progress) -> dict[str, Any]:
    """Both models alone, each on its own tokens of the same text: bits a byte compare, a KL there is none."""
    measured, original = (
        measure_folder(
            folder, length=_length(run), max_tokens=EVALUATION_TOKENS, device=run.device, threads=run.workers.threads,
            progress=progress,
        )
        for folder in (output, run.checkpoint.folder)
    )  # fmt: skip
    return beside(measured, original).to_json()


def _sample_kl(run: Run, output: Path, choice: Choice) -> float | None:
    """KL of the written files on the text that the prediction was made for."""
    measured = evaluate_streaming(
        output, run.checkpoint.folder, choice.sample, device=run.device, threads=run.workers.threads,
        generic=run.identity["generic"],
    )  # fmt: skip
    return measured.kl_mean


def _write_card_and_marker(run: Run, output: Path, journal: Journal, evaluation: Evaluation | None) -> None:
    results = None
    if evaluation is not None:
        results = {k: v for k, v in evaluation.to_json().items() if k not in UNSTABLE_RESULTS}
    content = marker(run, output, journal, results)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method", "")
    calibration = dataclasses.replace(run.recipe.calibration, text=None)  # its path is nobody else's; the hash stands
    recipe_yaml = dataclasses.replace(run.recipe, calibration=calibration).to_yaml()
    write_text(output / "README.md", model_card(content, recipe_yaml, output.name, method))
    write_json(output / MARKER, content)


def _completions(run: Run, output: Path, prompt: str) -> list[dict[str, str]]:
    original, compressed = (
        generate(folder, prompt, device=run.device, generic=run.identity["generic"])
        for folder in (run.checkpoint.folder, output)
    )
    return [{"prompt": prompt, "original": original, "compressed": compressed}]


def _write_page(summary: dict[str, Any], path: Path) -> None:
    summary["report"] = str(path)
    write_report(path, [summary])
