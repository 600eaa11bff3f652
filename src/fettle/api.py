"""The library in four calls: `load`, `compress`, `evaluate`, `generate`; and the two that look first: `plan`,
`inspect`.

import fettle

result = fettle.compress("demo", "demo-4bit", "gptq-4bit")
print(result.evaluation.kl_mean, fettle.generate("demo-4bit", "def add(a, b):"))
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fettle.data.tokenizer import has_tokenizer, load_tokenizer
from fettle.data.windows import evaluation_windows, read_text
from fettle.engine.completion import checked_prompt, complete
from fettle.errors import UsageError, unknown_word
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.result import Evaluation
from fettle.evaluate.streaming import evaluate as evaluate_streaming
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import INDEX, Checkpoint
from fettle.models.config_file import context_length
from fettle.models.loading import LoadedModel
from fettle.models.loading import load as load_model
from fettle.models.source import resolve
from fettle.models.writer import write_json, write_text
from fettle.pipeline.card import model_card
from fettle.pipeline.journal import Journal, run_folder
from fettle.pipeline.outline import outline
from fettle.pipeline.plan import Plan, plan_run
from fettle.pipeline.recipe import Recipe, load_recipe
from fettle.pipeline.run import (
    MARKER,
    Run,
    check_device,
    marker,
    monotonic_seconds,
    prepare,
    refuse_inside,
    require_context,
    stop_on_signals,
    write_model,
)
from fettle.pipeline.summary import read_summary, summarize
from fettle.progress import Progress, Silent
from fettle.report.atomic import require_writable
from fettle.report.page import write_report

EVALUATION_TOKENS = 16_384  # what `compress` measures itself on
AFFORDABLE_FLOPS = 2e12  # and the work up to which it does so unasked: under a minute on two cores
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNSTABLE_RESULTS = ("seconds", "peak_memory_bytes", "versions")  # differ from run to run, so not in the written model


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What `compress` did: the written folder, its measurement (None where it was left out), and the whole summary."""

    folder: Path
    evaluation: Evaluation | None
    summary: dict[str, Any]
    report_path: Path
    resumed_whole: bool = False  # nothing was done: the run was finished already


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
    report: str | Path | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    prompt: str | None = None,
) -> Compression:
    """Compresses a model into a standard checkpoint folder, measures what was written, and writes card and page.

    A run that was killed goes on where it stopped when it is called again with the same arguments, and writes the same
    bytes as an undisturbed one.

    Args:
        model: a local folder, a hub id, or "demo".
        output: the folder to write; beside it, `OUTPUT.run/` keeps the journal, the timings and the page.
        recipe: a Recipe, a YAML file, or the name of a shipped recipe.
        device: "cpu", "cuda" or "cuda:N".
        threads: how many to use; the result does not depend on it.
        fresh: start over instead of resuming.
        evaluate: measure the written files; None: where that takes under about a minute.
        generic: treat every linear of an unknown architecture alike.
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
    if report is not None:
        require_writable(Path(report))
    with stop_on_signals(output):
        run = prepare(model, chosen, device=device, threads=threads, generic=generic)
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
            evaluation = Evaluation.from_json(summary["evaluation"]) if summary["evaluation"] else None
            _write_page(summary, report_path)
            if summary != before:
                write_json(summary_path, summary)
                _write_card_and_marker(run, output, journal, evaluation)
    return Compression(
        folder=output, evaluation=evaluation, summary=summary, report_path=report_path, resumed_whole=before is not None
    )


def plan(
    model: str | Path,
    recipe: Recipe | str | Path = "default",
    *,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Predicts bytes (exactly), peak memory and time, and sends one block through the whole path, save included."""
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run = prepare(model, chosen, device=device, threads=threads, generic=generic)
    return plan_run(run, progress or Silent(), Path.cwd() if os.access(Path.cwd(), os.W_OK) else None)


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    length: int = 512,
    max_tokens: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures the files of a model, against the original where one is given; block by block, so memory stays small.

    Args:
        model: a local folder, a hub id, or "demo".
        reference: the original; without it, only what needs no original is measured.
        text: a UTF-8 file; None: the embedded held-out text.
        length: tokens a window, its first being BOS.
        max_tokens: use only the start of the text.
    """
    check_device(device)
    folder = resolve(model)
    require_context(Checkpoint.open(folder).config, length, "length")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UsageError(f"{model} has no tokenizer files, and a text can only be measured as tokens; add them to it")
    windows = evaluation_windows(tokenizer, read_text(text, variant="heldout"), length=length, max_tokens=max_tokens)
    base = resolve(reference) if reference is not None else None
    return evaluate_streaming(
        folder, base, windows, device=device, threads=threads, generic=generic, progress=progress or Silent()
    )


def load(model: str | Path, *, device: str = "cpu", dtype: str = "float32", generic: bool = False) -> LoadedModel:
    """Loads a model, compressed or not: `.model` (a transformers model), `.tokenizer`, `.anatomy`. Linears stored as
    codes stay so. `generic` is for an unknown family; a folder that was written so needs no telling.

    Raises:
        ModelError: damaged files, or tensors that are not those that fettle wrote.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise UsageError(unknown_word("dtype", str(dtype), DTYPES))
    return load_model(model, device=device, dtype=DTYPES[dtype], generic=generic)


def generate(
    model: str | Path | LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    generic: bool = False,
) -> str:
    """Continues a prompt; returns the new text alone. `temperature` 0 is greedy."""
    loaded = model if isinstance(model, LoadedModel) else load(model, device=device, generic=generic)
    return complete(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def inspect(model: str | Path, *, generic: bool = False) -> dict[str, Any]:
    """The anatomy of a model: blocks, linears by role, shapes, bytes, and the scheme of each."""
    checkpoint = Checkpoint.open(resolve(model))
    return outline(checkpoint, read_anatomy(checkpoint, generic=generic), str(model))


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


def _refuse_what_would_fail_later(run: Run, evaluate: bool | None, prompt: str | None) -> None:
    """Raises UsageError, naming the base, for a measurement or a completion that cannot be: before hours of work."""
    folder, anatomy = run.checkpoint.folder, run.anatomy
    if prompt is not None:
        if anatomy.causal and anatomy.head is None and not run.identity["generic"]:
            raise UsageError(f"{run.asked} has no language-model head: it cannot complete a prompt; leave it out")
        context = context_length(run.checkpoint.config)
        checked_prompt(run.asked, anatomy, load_tokenizer(folder), context, prompt)
    if not _is_measured(run, evaluate):
        return
    tokenizer = load_tokenizer(folder)
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
    measured = evaluate(
        output, reference=run.checkpoint.folder, length=_length(run), max_tokens=EVALUATION_TOKENS, device=run.device,
        threads=run.workers.threads, generic=run.identity["generic"], progress=progress,
    )  # fmt: skip
    return measured.to_json()


def _write_card_and_marker(run: Run, output: Path, journal: Journal, evaluation: Evaluation | None) -> None:
    results = None
    if evaluation is not None:
        results = {k: v for k, v in evaluation.to_json().items() if k not in UNSTABLE_RESULTS}
    content = marker(run, output, journal, results)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method", "compressed-tensors")
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
