"""choose: from a model and a budget to the recipe that keeps most of the model within it.

    calibration text → candidates of every linear, with their KL estimates (`sensitivities.py`)
    estimates + exact bytes → the cheapest mix that fits (`mixes.py`, `knapsack.py`)
    the mix, run on calibration text → measured; where estimates were far off, rescaled and chosen again (`refine.py`)

Only calibration text is looked at: the held-out text is for judging what comes out. The statistics come from the same
windows that the recipe will use, the sensitivities from windows of the same text drawn with another seed, so that a
method is not judged by the very tokens that it fitted.

`OUT.run/search/` keeps what was asked, the scanned blocks and, at last, the choice. The same command after a kill finds
them and goes on; as the recipe comes from there, the run that compresses is the same run, too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import Windows, calibration_windows, read_text
from fettle.diagnose.candidates import Candidate
from fettle.diagnose.original import Original
from fettle.errors import RecipeError, UsageError
from fettle.methods.protocols import BasisMethod
from fettle.models.config_file import context_length
from fettle.models.writer import write_json
from fettle.pipeline.journal import Journal, locked, refuse_foreign, run_folder
from fettle.pipeline.layout import build_layout
from fettle.pipeline.recipe import CalibrationOptions, Recipe, Step, assign, parse_recipe
from fettle.pipeline.run import Run, prepare, refuse_inside
from fettle.progress import Progress
from fettle.search.budget import Budget
from fettle.search.mixes import Mix, Problem, as_recipe, grouped
from fettle.search.refine import ESTIMATE_FACTOR, Round, settle
from fettle.search.sensitivities import drop_codes, scan_sensitivities, scanned_blocks

SAMPLE_TOKENS = 4096  # of calibration text, on which sensitivities are estimated and mixes measured
STORAGE = "pack-quantized"
CHOSEN = "chosen.json"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The recipe, what was predicted and measured on the way (plain data), and the text of the sample."""

    recipe: Recipe
    figures: dict[str, Any]
    sample: Windows


def choose(probe: Run, output: Path, budget: Budget, *, fresh: bool, progress: Progress) -> Choice:
    """The recipe for this budget; found anew, or taken from `OUT.run/search/` where the same was asked before.

    Args:
        probe: what `probe_run` prepared for the same budget.
        output: the folder that will be written.
        budget: what it may cost.
        fresh: search again, whatever lies there.
        progress: told of every block.

    Raises:
        UsageError: a budget that no choice of candidates can meet, or a model without tokenizer or head.
        ResumeError: a search that was begun for something else lies in the run folder.
    """
    calibration = probe.recipe.calibration
    refuse_inside(probe.checkpoint.folder, output)
    refuse_foreign(output)
    candidates = _checked(budget.chosen_from(str(probe.checkpoint.dtype).removeprefix("torch.")))
    problem = _problem(probe, budget, candidates)
    sample = _sample(probe, calibration)
    folder = run_folder(output) / "search"
    with locked(run_folder(output)):
        _open(folder, _identity(probe, budget, candidates, sample), fresh=fresh)
        if not (folder / CHOSEN).exists():
            write_json(folder / CHOSEN, _search(probe, problem, budget, sample, folder, progress))
        drop_codes(folder)  # also what a kill behind the line above left
    found = json.loads((folder / CHOSEN).read_text(encoding="utf-8"))
    recipe = parse_recipe(found["recipe"], str(folder / CHOSEN))
    recipe = replace(recipe, calibration=replace(recipe.calibration, text=calibration.text), basis=probe.recipe.basis)
    return Choice(recipe=recipe, figures=found["figures"], sample=sample)


def probe_run(
    model: str | Path,
    budget: Budget,
    calibration: CalibrationOptions,
    *,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    basis: BasisMethod | None = None,
) -> Run:
    """A run with one candidate in all linears: it checks model, text and budget, and knows what is compressed."""
    budget.validate()
    candidates = budget.chosen_from("float32")
    demanding = max(candidates, key=lambda candidate: len(candidate.method.needs()))
    recipe = Recipe(name="probe", steps=(Step(method=demanding.method),), calibration=calibration, basis=basis)
    return prepare(model, recipe, device=device, threads=threads, generic=generic)


def _checked(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    for candidate in candidates:
        candidate.scheme.check_storage(STORAGE)
    return tuple(candidates)


def _problem(probe: Run, budget: Budget, candidates: tuple[Candidate, ...]) -> Problem:
    """Groups and limit; a limit for the whole model leaves what all other tensors and the headers take."""
    linears = [item.linear for item in probe.layout.compressions]
    problem = Problem(
        groups=grouped(probe.anatomy, linears, budget.fused), candidates=candidates, storage=STORAGE, limit_bytes=0
    )
    weights = sum(linear.parameters for linear in linears)
    least = problem.smallest_bytes()
    if budget.bits_per_weight is not None:
        limit = int(budget.bits_per_weight * weights / 8)
        needed = f"{8 * least / weights:.4g} bits per weight"
    else:
        assert budget.size_bytes is not None
        beside = probe.layout.bytes - sum(
            x.scheme.stored_bytes(x.linear.shape, probe.layout.storage_of(x)) for x in probe.layout.compressions
        )
        limit = budget.size_bytes - beside
        needed = f"{least + beside:,} bytes, {beside:,} of them for what stays as it is"
    if least > limit:
        raise UsageError(
            f"the budget of {budget.title()} cannot be met: the smallest candidates need {needed}; allow more, or give "
            "smaller candidates, such as: gptq bits=2 group_size=128"
        )
    return replace(problem, limit_bytes=limit)


def _sample(probe: Run, calibration: CalibrationOptions) -> Windows:
    tokenizer = load_tokenizer(probe.checkpoint.folder)
    if tokenizer is None:
        raise UsageError(
            f"{probe.model} has no tokenizer files, and sensitivities are found on text; add them to the folder, or "
            "compress with a recipe"
        )
    text = probe.text or read_text(calibration.text)
    length = min(calibration.length, context_length(probe.checkpoint.config) or calibration.length)
    count = max(1, SAMPLE_TOKENS // length)
    return calibration_windows(tokenizer, text, windows=count, length=length, seed=calibration.seed + 1)


def _identity(probe: Run, budget: Budget, candidates: tuple[Candidate, ...], sample: Windows) -> dict[str, Any]:
    """What the choice depends on."""
    kept = {key: value for key, value in probe.identity.items() if key != "recipe"}
    return {
        **kept,
        "sample": hashlib.sha256(str([ids.tolist() for ids in sample.ids]).encode()).hexdigest(),  # text and tokenizer
        "calibration": probe.identity["recipe"]["calibration"],
        "basis": None if probe.recipe.basis is None else probe.identity["recipe"]["steps"][0],
        "bits_per_weight": budget.bits_per_weight,
        "size_bytes": budget.size_bytes,
        "fused": budget.fused,
        "candidates": [candidate.to_json() for candidate in candidates],
    }


def _open(folder: Path, identity: dict[str, Any], *, fresh: bool) -> None:
    """Makes the search's folder, or checks that what lies there was asked for with the same words."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / CHOSEN).exists() or scanned_blocks(folder) > 0
    if begun and not fresh and (folder / "identity.json").exists():
        Journal(folder).refuse_changes(identity)
    else:
        for pattern in ("block-*.json", "block-*.safetensors", CHOSEN):  # its own files, and nobody else's
            for path in folder.glob(pattern):
                path.unlink()
    write_json(folder / "identity.json", identity)


def _search(
    probe: Run, problem: Problem, budget: Budget, sample: Windows, folder: Path, progress: Progress
) -> dict[str, Any]:
    with probe.workers as workers, torch.no_grad():
        original = Original(
            probe.checkpoint, probe.anatomy, sample, device=probe.device, workers=workers,
            seed=probe.recipe.calibration.seed,
        )  # fmt: skip
        scan = scan_sensitivities(original, probe.windows, problem.candidates, folder, progress)
        best, rounds, problem = _settled(probe, problem, budget, scan.sensitivities, scan.measure)
    recipe = as_recipe(best.mix, problem.candidates, budget.title(), probe.recipe.calibration)
    fields = recipe.to_dict()
    fields["calibration"].pop("text", None)  # the text's hash is in the identity; its path may change
    return {"recipe": fields, "figures": _figures(problem, budget, best, rounds, sample, original.tokens)}


def _settled(
    probe: Run, problem: Problem, budget: Budget, sensitivities: dict[str, dict[str, float]], measure: Any
) -> tuple[Round, list[Round], Problem]:
    """`settle`, with the limit lowered until the whole written model fits: headers grow with the digits of shapes."""
    while True:
        best, rounds = settle(problem, sensitivities, measure)
        excess = 0 if budget.size_bytes is None else _written_bytes(probe, problem, best.mix) - budget.size_bytes
        if excess <= 0:
            return best, rounds, problem
        problem = replace(problem, limit_bytes=problem.limit_bytes - excess)
        if problem.smallest_bytes() > problem.limit_bytes:
            raise UsageError(
                f"the budget of {budget.title()} cannot be met: the smallest candidates need {excess:,} bytes more"
            )


def _written_bytes(probe: Run, problem: Problem, mix: Mix) -> int:
    recipe = as_recipe(mix, problem.candidates, "probe", probe.recipe.calibration)
    try:
        return build_layout(probe.checkpoint, probe.anatomy, assign(recipe, probe.anatomy), STORAGE).bytes
    except RecipeError as error:
        raise UsageError(f"the chosen mix cannot be written: {error}") from error


def _figures(
    problem: Problem, budget: Budget, best: Round, rounds: list[Round], sample: Windows, tokens: int
) -> dict[str, Any]:
    linears = [linear for group in problem.groups for linear in group]
    weights = {linear.name: linear.parameters for linear in linears}
    share: dict[str, float] = {}
    for name, label in best.mix.items():
        share[label] = share.get(label, 0.0) + weights[name] / sum(weights.values())
    first = rounds[0]
    uniform = next((found for found in rounds if len(set(found.mix.values())) == 1), None)
    return {
        "asked": {"bits_per_weight": budget.bits_per_weight, "size_bytes": budget.size_bytes, "fused": budget.fused},
        "bits_per_weight": 8 * best.stored_bytes / sum(weights.values()),
        "predicted_kl": best.predicted_kl,
        "measured_kl": best.measured_kl,
        "estimate_error": first.predicted_kl / first.measured_kl - 1 if first.measured_kl > 0 else None,
        "estimate_factor": ESTIMATE_FACTOR,
        "refined": sum(found.name.startswith("round") for found in rounds) > 1,
        "rounds": [found.to_json() for found in rounds],
        "uniform": None if uniform is None else {**uniform.to_json(), "candidate": next(iter(uniform.mix.values()))},
        "shares": dict(sorted(share.items())),
        "mix": best.mix,
        "tokens": tokens,
        "text_sha256": sample.sha256,
    }
