"""Everything that asks and writes no model: `plan`, `evaluate`, `diagnose`, `load`, `generate`, `inspect`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import evaluation_windows, read_text
from fettle.diagnose.model import DiagnosisOptions, diagnose_folder
from fettle.engine.completion import complete
from fettle.engine.names import AUTO
from fettle.engine.prompts import Vocabulary
from fettle.engine.runners import RunnerOptions, open_engine
from fettle.engine.sampler import Sampling
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.errors import UsageError, unknown_word
from fettle.evaluate.cached import CacheEvaluation
from fettle.evaluate.cached import evaluate_cache as measure_cache
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.result import Evaluation
from fettle.evaluate.streaming import evaluate as evaluate_streaming
from fettle.methods.protocols import MatrixMethod
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length
from fettle.models.kv_cache import cache_bytes, quantized_cache
from fettle.models.loading import LoadedModel
from fettle.models.loading import load as load_model
from fettle.models.source import resolve
from fettle.pipeline.outline import outline
from fettle.pipeline.plan import Plan, plan_run
from fettle.pipeline.recipe import Recipe, load_recipe
from fettle.pipeline.run import (
    check_device,
    display_name,
    monotonic_seconds,
    prepare,
    require_context,
    versions,
)
from fettle.progress import Progress, Silent
from fettle.search.allocation import allocated
from fettle.tensors.cache_codes import CacheScheme
from fettle.vision.classifier import ImageClassifier, is_image_classifier, open_classifier
from fettle.vision.evaluation import ClassifierEvaluation, evaluate_classifier
from fettle.vision.images import SHAPES, read_images
from fettle.vision.outline import outline_classifier
from fettle.vision.plan import ClassifierPlan, plan_classifier
from fettle.workers import Workers

LONGEST_CACHE_WINDOW = 4096  # tokens, unless asked
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan(
    model: str | Path,
    recipe: Recipe | str | Path = "default",
    *,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    progress: Progress | None = None,
) -> Plan | ClassifierPlan:
    """Predicts bytes (exactly), peak memory and time, and sends one block through the whole path, save included; for an
    image classifier widths, parameters, multiply-adds and bytes.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if is_image_classifier(resolve(model)):
        return plan_classifier(model, chosen, device=device)
    chosen = allocated(model, chosen, device=device, threads=threads, generic=generic, progress=progress)
    run = prepare(model, chosen, device=device, threads=threads, generic=generic)
    return plan_run(run, progress or Silent(), Path.cwd() if os.access(Path.cwd(), os.W_OK) else None)


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    images: str | Path | None = None,
    length: int = 512,
    max_tokens: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    reshaped: bool | None = None,
    progress: Progress | None = None,
) -> Evaluation | ClassifierEvaluation:
    """Measures the files of a model, against the original where one is given; block by block, so memory stays small.
    An image classifier is measured on images.

    Args:
        model: a local folder, a hub id, or "demo".
        reference: the original; without it, only what needs no original is measured.
        text: a UTF-8 file; None: the embedded held-out text.
        images: for an image classifier: a folder, an .npz or .safetensors file; None: the embedded images.
        length: tokens a window, its first being BOS.
        max_tokens: use only the start of the text.
        reshaped: whether blocks and widths may be others than the reference's; None: as the folder's fettle.json says.
    """
    check_device(device)
    if is_image_classifier(resolve(model)):
        return _evaluate_classifier(model, reference, text, images, device)
    if images is not None:
        raise UsageError(f"{model} is no image classifier, so there is nothing to show images to; leave images out")
    return evaluate_language_model(
        model, reference=reference, text=text, length=length, max_tokens=max_tokens, device=device, threads=threads,
        generic=generic, reshaped=reshaped, progress=progress,
    )  # fmt: skip


def evaluate_language_model(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    length: int = 512,
    max_tokens: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    reshaped: bool | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """`evaluate` of a language model, on text."""
    check_device(device)
    folder = resolve(model)
    require_context(Checkpoint.open(folder).config, length, "length")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UsageError(f"{model} has no tokenizer files, and a text can only be measured as tokens; add them to it")
    windows = evaluation_windows(tokenizer, read_text(text, variant="heldout"), length=length, max_tokens=max_tokens)
    base = resolve(reference) if reference is not None else None
    return evaluate_streaming(
        folder, base, windows, device=device, threads=threads, generic=generic, reshaped=reshaped,
        progress=progress or Silent(),
    )  # fmt: skip


def _evaluate_classifier(
    model: str | Path, reference: str | Path | None, text: str | Path | None, images: str | Path | None, device: str
) -> ClassifierEvaluation:
    if text is not None:
        raise UsageError(f"{model} is an image classifier and reads no text; give images instead")
    found = open_classifier(model, device=device)
    base = None if reference is None else open_classifier(reference, device=device)
    if base is not None and len(base.labels) != len(found.labels):
        raise UsageError(f"{model} knows {len(found.labels)} classes and {reference} {len(base.labels)}: they differ")
    shown = read_images(images or SHAPES, found.preprocessing, found.labels, held_out=True)
    with Workers(1):
        measured = evaluate_classifier(found, base, shown, device=device)
    return dataclasses.replace(measured, versions=versions())


def evaluate_cache(
    model: str | Path,
    scheme: CacheScheme,
    *,
    text: str | Path | None = None,
    length: int | None = None,
    max_tokens: int = 8192,
    device: str = "cpu",
    generic: bool = False,
) -> CacheEvaluation:
    """Measures what keeping the key-value cache as codes costs, against the same model with an exact cache.

    Args:
        model: a local folder, a hub id, or "demo"; it is loaded whole.
        scheme: bits, group size, and how many of the newest tokens stay exact.
        text: a UTF-8 file; None: the embedded held-out text.
        length: tokens a window; None: the model's context, at most 4,096.
        max_tokens: use only the start of the text.
    """
    scheme.check()
    loaded = load_model(model, device=device, generic=generic)
    if loaded.tokenizer is None:
        raise UsageError(f"{model} has no tokenizer files, and a text can only be measured as tokens; add them to it")
    config = loaded.model.config.to_dict()
    chosen = length or min(context_length(config) or LONGEST_CACHE_WINDOW, LONGEST_CACHE_WINDOW)
    require_context(config, chosen, "length")
    windows = evaluation_windows(
        loaded.tokenizer, read_text(text, variant="heldout"), length=chosen, max_tokens=max_tokens
    )
    ids = [window.to(device) for window in windows.ids]
    return measure_cache(loaded.model, ids, lambda: quantized_cache(loaded, scheme), cache_bytes)


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


def load(
    model: str | Path, *, device: str = "cpu", dtype: str = "float32", generic: bool = False
) -> LoadedModel | ImageClassifier:
    """Loads a model, compressed or not: `.model` (a transformers model), `.tokenizer`, `.anatomy`. Linears stored as
    codes stay so. `generic` is for an unknown family; a folder that was written so needs no telling. Of an image
    classifier: `.model`, `.labels`, `.preprocessing`.

    Raises:
        ModelError: damaged files, or tensors that are not those that fettle wrote.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise UsageError(unknown_word("dtype", str(dtype), DTYPES))
    if is_image_classifier(resolve(model)):
        found = open_classifier(model, device=device)
        found.model.to(DTYPES[dtype])
        return found
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
    engine: str = AUTO,
) -> str:
    """Continues a prompt; returns the new text alone. `temperature` 0 is greedy.

    A `LoadedModel` is run by torch as it is; a name is opened with `engine` (as `open_engine`).
    """
    check_device(device)
    if isinstance(model, LoadedModel):
        return complete(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    vocabulary = Vocabulary.of_folder(resolve(model), generic=generic)
    ids, sampling = vocabulary.encode(prompt), Sampling(temperature=temperature, seed=seed)
    wanted = Request(prompt=ids, sampling=sampling, max_tokens=max_new_tokens)
    longest = min(len(ids) + max_new_tokens, vocabulary.context_length or len(ids) + max_new_tokens)
    options = RunnerOptions(cache_tokens=longest, device=device, generic=generic)
    alone = SchedulerOptions(max_sequences=1)
    return open_engine(model, engine=engine, runner=options, scheduler=alone).generate([wanted])[0].text


def inspect(model: str | Path, *, generic: bool = False) -> dict[str, Any]:
    """The anatomy of a model: blocks, linears by role, shapes, bytes, and the scheme of each; of an image classifier
    its layers, parameters and multiply-adds.
    """
    if is_image_classifier(resolve(model)):
        return outline_classifier(model)
    checkpoint = Checkpoint.open(resolve(model))
    return outline(checkpoint, read_anatomy(checkpoint, generic=generic), str(model))
