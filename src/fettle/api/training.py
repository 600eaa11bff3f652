"""`train`: a model through a chain of stages, each resumable, to a written and measured folder and its page.

`OUT.run/stages/` holds everything that the stages leave to each other: `01-distill/` the folder that a stage wrote,
`01-distill.run/` its checkpoints and curve, `01-distill.json` that it is done; `answers/` the teachers' kept answers,
which every stage that asks the same reads. A killed chain goes on in the stage, and there at the checkpoint, where it
stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fettle.api.completing import complete
from fettle.api.compressing import EVALUATION_TOKENS, compress
from fettle.api.judging import (
    ADAPTER,
    INPUT,
    Judge,
    compresses_behind_training,
    is_judged,
    judging_text,
    loss_of_stage,
)
from fettle.data.windows import read_text
from fettle.errors import ModelError, UsageError
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.result import Evaluation
from fettle.methods.train import Adapter, TrainMethod
from fettle.methods.train.adapter_files import check_files
from fettle.methods.train.adapters import VIRTUAL
from fettle.methods.train.curve import CHECKPOINTS, Curve
from fettle.methods.train.job import TrainJob
from fettle.methods.train.named_teachers import teacher_hashes
from fettle.methods.train.options import BEFORE, SignalFields
from fettle.methods.train.processes import is_main_process, process_group, wait_for_all
from fettle.methods.train.training import train as train_stage
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import read_json
from fettle.models.source import resolve
from fettle.models.writer import write_json
from fettle.pipeline.chain import Chain, Stage, load_chain
from fettle.pipeline.journal import Journal, locked, refuse_foreign, run_folder
from fettle.pipeline.run import (
    MARKER,
    check_device,
    display_name,
    refuse_inside,
    require_context,
    stop_on_signals,
    tokenizer_hashes,
    versions,
)
from fettle.progress import Progress, Silent
from fettle.report.atomic import require_writable
from fettle.report.page import write_report

MOST_THREADS = 1024  # torch starts as many as it is told, and dies of too many
STAGES, IDENTITY, ANSWERS = "stages", "identity.json", "answers"
ADAPTER_RECORD = "fettle_adapter.json"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What `train` did: the written folder, its measurement (None where it was left out), summary, page."""

    folder: Path
    evaluation: Evaluation | None
    summary: dict[str, Any]
    report_path: Path


def train(
    model: str | Path,
    output: str | Path,
    chain: Chain | str | Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    fresh: bool = False,
    evaluate: bool = True,
    generic: bool = False,
    judge: str | Path | None = None,
    report: str | Path | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Training:
    """Trains a model through a chain of stages and writes a folder: a checkpoint, or an adapter in PEFT's format.

    A run that was killed goes on where it stopped when it is called again with the same arguments, and writes the same
    bytes as an undisturbed one, on the same number of threads (and unless minutes end it).

    Args:
        model: a local folder, a hub id, or "demo"; where no teacher is named, it is the teacher.
        output: the folder to write; beside it, `OUTPUT.run/` keeps stages, checkpoints, curves and the page.
        chain: a Chain, a YAML file, or the name of a shipped chain.
        device: "cpu", "cuda" or "cuda:N".
        threads: torch's threads while it trains; None leaves them as they are.
        fresh: start over instead of resuming.
        evaluate: measure the written model, or base and adapter, against `model`, and every stage that compresses what
            was trained against what it read.
        generic: treat every linear of an unknown architecture alike.
        judge: the UTF-8 text to measure on; None for the embedded held-out one.
        report: where the page goes; None: `OUTPUT.run/report.html`.
        progress: told how far it is.
        command: the command that reproduces this, for the page.

    Raises:
        UsageError, ModelError, ResourceError, InterruptedRunError: see `fettle.errors`.
    """
    progress, output, started = progress or Silent(), Path(output), time.monotonic()
    restart_peak()
    chosen = chain if isinstance(chain, Chain) else load_chain(chain)
    check_device(device)
    _check_threads(threads)
    page = _page(report, output)
    folder = resolve(model)
    refuse_inside(folder, output)
    text = judging_text(judge, chosen) if evaluate else None
    stages = run_folder(output) / STAGES
    if not (stages / IDENTITY).is_file():
        refuse_foreign(output)
    checkpoint = Checkpoint.open(folder)
    _check_lengths(chosen, checkpoint)
    before, began = torch.get_num_threads(), run_folder(output).exists()
    torch.set_num_threads(threads or before)
    try:
        with stop_on_signals(output), _held(stages):
            _begin(stages, output, _identity(chosen, checkpoint, device, generic), fresh=fresh)
            lines = [
                _run_stage(chosen, number, model, output, stages, (device, threads, generic), progress)
                for number in range(len(chosen.stages))
            ]
            summary = _summary(chosen, model, checkpoint, output, lines) | {"command": command or ""}
            if text is not None and is_main_process():
                how = Judge(text=text, tokens=EVALUATION_TOKENS, device=device, generic=generic, progress=progress)
                found = _judged(how, chosen, [folder, *_written(chosen, stages, output)], stages, lines)
                summary["evaluation"] = found.to_json() if found is not None else None
            if is_main_process():
                write_json(run_folder(output) / "training.json", summary)
                write_report(page, [summary])
    except UsageError:
        if not began and is_main_process() and not _has_begun(stages):
            shutil.rmtree(run_folder(output), ignore_errors=True)  # refused before any work: nothing to go on with
        raise
    finally:
        torch.set_num_threads(before)
    summary["sitting_seconds"] = round(time.monotonic() - started, 3)
    told = summary["evaluation"]
    return Training(
        folder=output, evaluation=Evaluation.from_json(told) if told else None, summary=summary, report_path=page
    )


def _page(report: str | Path | None, output: Path) -> Path:
    """Where the page goes; one that is asked for must be writable before any work."""
    if report is None:
        return run_folder(output) / "report.html"
    require_writable(Path(report))
    return Path(report)


def _check_threads(threads: int | None) -> None:
    """Raises UsageError for a number of threads that torch cannot start."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(
            f"threads={threads} cannot be; allowed: 1 to {MOST_THREADS}, or none for as many as torch takes"
        )


def _check_lengths(chain: Chain, checkpoint: Checkpoint) -> None:
    """Raises UsageError for windows, with the virtual tokens in front of them, longer than the model's context."""
    for stage in chain.stages:
        if stage.method is not None:
            tokens, what = getattr(stage.method, "length", 0), "length"
            if isinstance(stage.method, Adapter) and stage.method.kind in VIRTUAL:
                tokens, what = tokens + stage.method.virtual_tokens, "length and virtual_tokens"
            require_context(checkpoint.config, tokens, what)


def _has_begun(stages: Path) -> bool:
    """Whether a stage is done or has a checkpoint that a resumed run would go on from."""
    done = [path for path in stages.glob("*.json") if path.name != IDENTITY]
    return bool(done) or any(stages.glob(f"*/{CHECKPOINTS}/*"))


def _held(stages: Path) -> Any:
    """The lock of a run; processes that torchrun started beside the first work under its."""
    import contextlib

    return locked(stages) if is_main_process() else contextlib.nullcontext()


def _identity(chain: Chain, checkpoint: Checkpoint, device: str, generic: bool) -> dict[str, Any]:
    """What a resumed run must have been started with."""
    texts = []
    for stage in chain.stages:
        for name in ("text", "held_back_text", "replay") if stage.method is not None else ():
            path = getattr(stage.method, name)
            if name == "text" or path is not None:
                texts.append((name, read_text(path).sha256))
        if stage.recipe is not None and stage.recipe.calibration.text is not None:
            texts.append(("calibration", read_text(stage.recipe.calibration.text).sha256))
    told = chain.to_dict()
    return {
        "model": checkpoint.file_hashes(),
        "chain": json.loads(json.dumps(told)),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "teachers": {name: teacher_hashes(name) for name in _teachers(chain)},
        "tokenizer": tokenizer_hashes(checkpoint.folder),
        "generic": generic,
        "device": torch.device(device).type,
        "versions": {name: versions()[name] for name in ("fettle", "torch", "transformers")},
    }


def _teachers(chain: Chain) -> list[str]:
    """The models that stages learn from, beside the chain's own."""
    methods = [stage.method for stage in chain.stages if stage.method is not None]
    named = {name for method in methods if isinstance(method, SignalFields) for name in method.teachers()}
    return sorted(named - {BEFORE})


def _begin(stages: Path, output: Path, identity: dict[str, Any], *, fresh: bool) -> None:
    """Refuses another run's stages, or removes them.

    Raises:
        ResumeError: they were begun with something else.
        UsageError: the output holds a model that this run did not write.
    """
    if not is_main_process():
        return
    journal, known = Journal(stages), (stages / IDENTITY).is_file()
    if known and fresh:
        for path in stages.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        Journal(run_folder(output)).clear(output)
    elif known:
        journal.refuse_changes(identity)
    elif output.is_dir() and any(output.iterdir()):
        raise UsageError(f"the output {output} holds a model that no training wrote there; name another folder")
    write_json(stages / IDENTITY, identity)


def _run_stage(
    chain: Chain, number: int, model: str | Path, output: Path, stages: Path, how: tuple[str, int | None, bool],
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Runs one stage, unless it is done; returns what it was and cost."""
    stage, device, generic = chain.stages[number], how[0], how[2]
    source = model if number == 0 else stages / _stage_name(chain, number - 1)
    name = _stage_name(chain, number)
    target = output if number == len(chain.stages) - 1 else stages / name
    done = stages / f"{name}.json"
    told = _done(done, target)
    if told is not None:
        return told
    line: dict[str, Any] = {"name": name, "stage": stage.name, "curve": None}
    started = time.monotonic()
    if stage.method is not None:
        curve = _train(stage.method, source, model, target, stages / f"{name}.run", device, generic, progress)
        line |= {"curve": curve.to_json(), "seconds": curve.seconds}
    elif is_main_process():
        _compress(stage, source, target, how, progress)
    line["student"], line["signals"] = _student(target), _signals(target)
    line.setdefault("seconds", round(time.monotonic() - started, 3))
    if is_main_process():
        write_json(done, line)
        shutil.rmtree(stages / f"{name}.run" / CHECKPOINTS, ignore_errors=True)  # nobody goes back behind a stage
    process_group(device)
    wait_for_all()  # the next stage reads what the first process wrote
    return line


def _done(done: Path, target: Path) -> dict[str, Any] | None:
    """What a stage was and cost, where it is done and all that it wrote lies there as it was written; else it is run
    again, to the same bytes.
    """
    try:
        told = read_json(done)
        if (target / ADAPTER).is_file():
            check_files(target)
            return told
        checkpoint = Checkpoint.open(target)
        checkpoint.verify_hashes()
    except ModelError:
        return None
    return told if checkpoint.record is not None else None


def _student(target: Path) -> dict[str, Any] | None:
    """Of which blocks the student of a stage was made; None where it was not."""
    marker = target / MARKER
    found = json.loads(marker.read_text(encoding="utf-8")).get("student") if marker.is_file() else None
    return dict(found) if found else None


def _signals(target: Path) -> dict[str, float]:
    """What a stage that trained learned from, and with which weights; an encoder's are not those of its fields."""
    records = [target / name for name in (MARKER, ADAPTER_RECORD) if (target / name).is_file()]
    training = json.loads(records[0].read_text(encoding="utf-8")).get("training") if records else None
    return dict((training or {}).get("signals") or {})


def _stage_name(chain: Chain, number: int) -> str:
    return f"{number + 1:02d}-{chain.stages[number].name}"


def _train(
    method: TrainMethod, source: str | Path, original: str | Path, target: Path, folder: Path, device: str,
    generic: bool, progress: Progress,
) -> Curve:  # fmt: skip
    job = TrainJob(
        model=source, original=original, output=target, folder=folder, answers=folder.parent / ANSWERS,
        base_name=display_name(source), device=device, generic=generic, progress=progress, complete=complete,
    )  # fmt: skip
    return train_stage(method, job)


def _compress(
    stage: Stage, source: str | Path, target: Path, how: tuple[str, int | None, bool], progress: Progress
) -> None:
    assert stage.recipe is not None
    device, threads, generic = how
    compress(
        source, target, stage.recipe, device=device, threads=threads, evaluate=False, generic=generic, progress=progress
    )


def _written(chain: Chain, stages: Path, output: Path) -> list[Path]:
    """The folder of each stage."""
    return [*(stages / _stage_name(chain, number) for number in range(len(chain.stages) - 1)), output]


def _judged(
    judge: Judge, chain: Chain, folders: list[Path], stages: Path, lines: list[dict[str, Any]]
) -> Evaluation | None:
    """Measures the last of the folders (what the chain began with, then each stage's) against the first, and puts into
    the lines of stages that compressed what was trained what that lost; None for an adapter of an encoder.
    """
    for number, line in enumerate(lines):
        if compresses_behind_training(chain, number) and not is_judged(line, judge.text):
            line[INPUT] = loss_of_stage(judge, folders[number + 1], folders[number])
            write_json(stages / f"{line['name']}.json", line)
    if (folders[-1] / ADAPTER).is_file():
        anatomy = read_anatomy(Checkpoint.open(folders[-2]), generic=judge.generic)
        if not anatomy.causal or anatomy.head is None:
            return None
    return judge.measure(folders[-1], folders[0], folders[-2])


def _summary(
    chain: Chain, model: str | Path, checkpoint: Checkpoint, output: Path, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Plain data for the page: what was run, and its curves; not measured yet."""
    return {
        "schema": 1,
        "kind": "training",
        "model": display_name(model),
        "base": {"name": display_name(model), "bytes": _bytes(checkpoint.folder / x for x in checkpoint.shards)},
        "output": {
            "folder": str(output), "bytes": _bytes(output.glob("*.safetensors")), "hashes": {},
            "adapter": (output / ADAPTER).is_file(),
        },
        "recipe": {"name": chain.name},
        "recipe_yaml": chain.to_yaml(),
        "stages": lines,
        "seconds": sum(line["seconds"] for line in lines),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
        "evaluation": None,
    }  # fmt: skip


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
