"""The library in four calls: `load`, `compress`, `evaluate`, `generate`; and the three that look first: `plan`,
`inspect`, `diagnose`.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import evaluation_windows, read_text
from fettle.diagnose.model import DiagnosisOptions, diagnose_folder
from fettle.engine.completion import complete
from fettle.errors import UsageError, unknown_word
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.result import Evaluation
from fettle.evaluate.streaming import evaluate as evaluate_streaming
from fettle.methods.protocols import MatrixMethod
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint, context_length
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
    calibration_summary,
    check_device,
    display_name,
    marker,
    monotonic_seconds,
    prepare,
    refuse_inside,
    require_context,
    stop_on_signals,
    versions,
    write_model,
)
from fettle.progress import Progress, Silent
from fettle.report.page import write_report
from fettle.search.budget import Budget
from fettle.search.choose import Choice, choose, probe_run

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
    budget: Budget | None = None,
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
        budget: how small it has to be; each linear then gets the scheme with which the whole keeps most, and only the
            calibration of `recipe` is used.
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
    with stop_on_signals(output):
        choice = None
        if budget is not None:
            probe = probe_run(model, budget, chosen.calibration, device=device, threads=threads, generic=generic)
            choice = choose(probe, output, budget, fresh=fresh, progress=progress)
            chosen = choice.recipe
        run = prepare(model, chosen, device=device, threads=threads, generic=generic)
        refuse_inside(run.checkpoint.folder, output)
        with Journal.open(output, run.identity, fresh=fresh) as journal:
            summary_path = run_folder(output) / "summary.json"
            report_path = Path(report) if report is not None else run_folder(output) / "report.html"
            before = _finished(run, output, journal, summary_path)
            summary = copy.deepcopy(before) or _compressed(run, output, journal, progress, started)
            summary.setdefault("command", command or "")  # the library cannot know of one that does the same
            if summary["evaluation"] is None and (evaluate or before is None):
                summary["evaluation"] = _measure(run, output, evaluate, progress)
            if prompt is not None and [pair["prompt"] for pair in summary["completions"]] != [prompt]:
                summary["completions"] = _completions(run, output, prompt)
            if choice is not None:
                summary["budget"] = summary.get("budget") or {**choice.figures, "written_kl": None}
                if summary["evaluation"] and summary["budget"]["written_kl"] is None:
                    summary["budget"]["written_kl"] = _sample_kl(run, output, choice)
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


def diagnose(
    model: str | Path,
    *,
    candidates: Sequence[MatrixMethod | str | Mapping[str, Any]] | None = None,
    sample: int | None = None,
    text: str | Path | None = None,
    calibration: str | Path | None = None,
    windows: int = 32,
    length: int = 256,
    max_tokens: int = 2048,
    draws: int = 1,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Shows where a model is sensitive: what each linear costs in each scheme, measured and estimated, and why.

    Returns plain data, as `fettle diagnose --json` prints it (`docs/json.md`); `words` is the paragraph to begin with.

    Args:
        model: a local folder, a hub id, or "demo"; not compressed, with a language-model head.
        candidates: methods, texts such as "gptq bits=3 group_size=64", or a recipe's steps; None: round_to_nearest and
            gptq with 2, 3, 4 and 8 bits.
        sample: how many linears are measured exactly, drawn by `seed`; None: all. Estimates cover all.
        text: what the KL is measured on, a UTF-8 file; None: the embedded held-out text.
        calibration: what the candidates' methods look at; None: the embedded calibration text.
        windows: how many windows of calibration.
        length: tokens a window, of both texts.
        max_tokens: how much of `text` is used.
        draws: how often labels are drawn for the estimate.
        seed: for windows, labels and the sample.
        device: "cpu", "cuda" or "cuda:N".
        threads: how many to use; no figure depends on it.
        generic: treat every linear of an unknown architecture alike.
        progress: told how far it is.

    Raises:
        UsageError: a compressed model, one without tokenizer or head, or a number that cannot be.
    """
    check_device(device)
    started = time.monotonic()
    restart_peak()
    options = DiagnosisOptions(
        candidates=candidates, sample=sample, text=text, calibration=calibration, windows=windows, length=length,
        max_tokens=max_tokens, draws=draws, seed=seed,
    )  # fmt: skip
    found = diagnose_folder(resolve(model), options, device=device, threads=threads, generic=generic, progress=progress)
    return {
        "schema": 1, "kind": "diagnosis", "model": display_name(model), **found, "versions": versions(),
        "seconds": monotonic_seconds(started), "peak_memory_bytes": peak_memory_bytes(),
    }  # fmt: skip


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
    if not (output / MARKER).exists() or not summary_path.exists():
        return None
    if len(journal.records(output)) < len(run.layout.units):
        return None
    summary: dict[str, Any] = json.loads(summary_path.read_text(encoding="utf-8"))
    return summary


def _compressed(run: Run, output: Path, journal: Journal, progress: Progress, started: float) -> dict[str, Any]:
    """Writes what is missing of the model; returns the summary, not measured yet."""
    earlier = sum(record.seconds for record in journal.records(output))  # what a stopped run spent already
    write_model(run, output, journal, progress)
    return {
        **_summary(run, output, journal),
        "seconds": earlier + monotonic_seconds(started),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _measure(run: Run, output: Path, wanted: bool | None, progress: Progress) -> dict[str, Any] | None:
    folder = run.checkpoint.folder
    tokenizer = load_tokenizer(folder)
    if wanted is False or (tokenizer is None and wanted is None):
        return None
    parameters = sum(math.prod(entry.shape) for entry in run.checkpoint.entries.values())
    if wanted is None and 2 * 2 * parameters * EVALUATION_TOKENS > AFFORDABLE_FLOPS:
        return None
    length = min(512, context_length(run.checkpoint.config) or 512)
    measured = evaluate(
        output, reference=folder, length=length, max_tokens=EVALUATION_TOKENS, device=run.device,
        threads=run.workers.threads, generic=run.identity["generic"], progress=progress,
    )  # fmt: skip
    return measured.to_json()


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


def _summary(run: Run, output: Path, journal: Journal) -> dict[str, Any]:
    records = journal.records(output)
    base_bytes = sum((run.checkpoint.folder / shard).stat().st_size for shard in run.checkpoint.shards)
    return {
        "schema": 1,
        "kind": "compression",
        "model": run.model,
        "base": {"name": run.model, "bytes": base_bytes, "hashes": run.identity["model"]},
        "output": {
            "folder": str(output),
            "bytes": sum(record.bytes for record in records),
            "hashes": {record.shard: record.sha256 for record in records},
        },
        "recipe": run.recipe.to_dict(),
        "recipe_yaml": run.recipe.to_yaml(),
        "asked": run.asked,
        "calibration": calibration_summary(run),
        "ledger": [line for record in records for line in record.ledger],
        "versions": versions(),
        "evaluation": None,
        "completions": [],
    }


def _write_page(summary: dict[str, Any], path: Path) -> None:
    summary["report"] = str(path)
    write_report(path, [summary])
