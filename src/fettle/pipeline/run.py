"""compress: from a model and a recipe to a written, measured, documented folder.

    open and check the base → recipe onto anatomy → layout (bytes known) → room on the disk? → walk → index, config,
    tokenizer → measure the written files → model card → fettle.json, last

`fettle.json` is the completion marker: a folder without it is not finished, whatever else lies in it, and the index
and the config, without which no loader opens the folder, are written only after the last shard.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import fettle
from fettle.data.tokenizer import has_tokenizer
from fettle.data.windows import Text, Windows, calibration_windows, read_text
from fettle.errors import CheckpointError, DiskFullError, InterruptedRunError, UsageError
from fettle.methods.protocols import BasisMethod
from fettle.methods.registry import prunes_networks, to_fields
from fettle.methods.train.writing import BEGUN_AFRESH
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length
from fettle.models.loading import TOKENIZER_FILES
from fettle.models.rotated import BASIS_KEY, RotatedCheckpoint, rotate
from fettle.models.source import resolve
from fettle.models.storage import dense_config, quantization_config, stored_schemes
from fettle.models.writer import copy_side_files, write_index, write_json
from fettle.pipeline.journal import Journal, run_folder
from fettle.pipeline.layout import Layout, build_layout
from fettle.pipeline.recipe import CalibrationOptions, Recipe, assign
from fettle.pipeline.reshaping import replace_side_files, require_unshared, reshape, tokenizer_of
from fettle.pipeline.settling import settle
from fettle.pipeline.stream import Job
from fettle.pipeline.walk import walk
from fettle.progress import Progress
from fettle.tensors.masked import MaskedScheme
from fettle.workers import Workers

MARKER = "fettle.json"
MAX_CALIBRATION_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class Run:
    """A compression with everything read and checked that can be before any work."""

    model: str  # its name in cards and pages
    asked: str  # the user's own word for it: a command that is to work again needs that
    checkpoint: Checkpoint
    anatomy: Anatomy
    recipe: Recipe
    layout: Layout
    text: Text | None  # None where no method looks at data
    windows: Windows | None
    identity: dict[str, Any]
    device: str
    workers: Workers
    reshaped: tuple[dict[str, Any], ...] = ()  # what the reshaping steps decided; `checkpoint` is then a view
    base_is_reshaped: bool = False  # an earlier run gave it another shape than that of what it was made from
    base_begun_afresh: bool = False  # an earlier training began at random weights

    @property
    def job(self) -> Job:
        """What the walk gets."""
        return Job(
            checkpoint=self.checkpoint,
            anatomy=self.anatomy,
            layout=self.layout,
            windows=self.windows.ids if self.windows is not None else (),
            order=self.recipe.calibration.order,
            device=self.device,
            workers=self.workers,
        )


def prepare(
    model: str | Path, recipe: Recipe, *, device: str = "cpu", threads: int | None = None, generic: bool = False
) -> Run:
    """Opens the base, maps the recipe onto it and cuts the calibration text; writes nothing.

    Raises:
        ModelError: the base is damaged, unsafe or unknown.
        RecipeError: the recipe cannot be for this model.
        UsageError: no such device, a base that is compressed already, or a calibration text that is empty.
    """
    check_device(device)
    _refuse_network_methods(recipe, model)
    folder = resolve(model)
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint, generic=generic)
    stored = [found.scheme for found in stored_schemes(checkpoint, anatomy).values()]
    if stored or checkpoint.shared:
        pruned = ", or prune with storage: dense first" if any(isinstance(x, MaskedScheme) for x in stored) else ""
        raise UsageError(f"{model} is compressed already; compress the model that it was made from{pruned}")
    workers, base_record = Workers(threads), checkpoint.record
    calibration = _Calibration(recipe.calibration, checkpoint.config)
    shaped = reshape(
        checkpoint, anatomy, recipe.reshaping, calibration.cut, calibration.whole, device=device, workers=workers
    )
    if recipe.compressing or recipe.basis is not None:
        require_unshared(shaped.checkpoint)
    checkpoint, anatomy = in_basis(shaped.checkpoint, shaped.anatomy, recipe.basis)
    methods = settle(checkpoint, anatomy, assign(recipe, anatomy), workers)
    layout = build_layout(checkpoint, anatomy, methods, recipe.storage)
    if isinstance(checkpoint, RotatedCheckpoint):  # what becomes codes is not rounded to the base's type before
        checkpoint = checkpoint.in_float32(item.linear.weight_name for item in layout.compressions)
    if any(item.looks_at_data for item in layout.compressions):
        if not has_tokenizer(folder):
            raise UsageError(
                f"the recipe {recipe.name} looks at data, but {model} has no tokenizer files; add them to the folder or "  # noqa: E501
                "use a method without calibration, such as round_to_nearest"
            )
        calibration.cut(tokenizer_of(checkpoint))
    text, windows = calibration.text, calibration.windows
    recipe_fields = recipe.to_dict()
    recipe_fields["calibration"].pop("text", None)  # the text's hash says what it is; its path may change
    with workers:
        hashes = checkpoint.file_hashes()
    identity: dict[str, Any] = {
        "model": hashes,
        "recipe": recipe_fields,
        "text": text.sha256 if text is not None else None,
        "device": torch.device(device).type,
        "generic": generic,
        "tokenizer": tokenizer_hashes(folder) if windows is not None or recipe.reshaping else None,
        "versions": {name: versions()[name] for name in ("fettle", "torch", "transformers")},
    }
    timed = [{"kept": x.get("kept"), "dropped": x.get("dropped")} for x in shaped.decided if "pieces" in x]
    if timed:  # times are not the same twice: what is written goes on only where they say the same again
        identity["shape"] = timed
    return Run(
        model=display_name(model), asked=str(model), checkpoint=checkpoint, anatomy=anatomy, recipe=recipe,
        layout=layout, text=text, windows=windows, identity=identity, device=device, workers=workers,
        reshaped=shaped.decided, base_is_reshaped=bool((base_record or {}).get("reshaped")),
        base_begun_afresh=bool((base_record or {}).get(BEGUN_AFRESH)),
    )  # fmt: skip


def _refuse_network_methods(recipe: Recipe, model: str | Path) -> None:
    """Raises UsageError for a step, or images, that only an image classifier can take."""
    for step in recipe.steps:
        if prunes_networks(step.method):
            raise UsageError(
                f"{step.method.name} prunes the filters of image classifiers, and {model} is none; to narrow a "
                "language model use narrow or resize"
            )
    if recipe.calibration.images is not None:
        raise UsageError(f"images are for image classifiers, and {model} is none; leave out --images")


class _Calibration:
    """The calibration text, read when somebody first looks at it, and its windows as they were cut last."""

    def __init__(self, options: CalibrationOptions, config: Mapping[str, Any]) -> None:
        self._options, self._config = options, config
        self.text: Text | None = None
        self.windows: Windows | None = None

    def cut(self, tokenizer: Any) -> Windows:
        options = self._options
        _require_possible(options, self._config)
        self.text = self.text or read_text(options.text)
        self.windows = calibration_windows(
            tokenizer, self.text, windows=options.windows, length=options.length, seed=options.seed
        )
        return self.windows

    def whole(self) -> str:
        self.text = self.text or read_text(self._options.text)
        return self.text.content


def in_basis(checkpoint: Checkpoint, anatomy: Anatomy, basis: BasisMethod | None) -> tuple[Checkpoint, Anatomy]:
    """The checkpoint as `basis` leaves it, and the anatomy of that; as they are where there is none."""
    if basis is None:
        return checkpoint, anatomy
    if BASIS_KEY in checkpoint.config:
        raise UsageError("the model is rotated already, and hidden states are compared in one rotation; leave it out")
    rotated = rotate(checkpoint, anatomy, basis)
    return rotated, read_anatomy(rotated, generic=anatomy.family == "generic")


def tokenizer_hashes(folder: Path) -> dict[str, str]:
    """File → SHA-256 of what the calibration text was cut with."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name in TOKENIZER_FILES or path.name == "tokenizer_config.json"
    }


def require_context(config: Mapping[str, Any], length: int, what: str) -> None:
    """Raises UsageError for windows longer than the model's context; `what` names the option."""
    context = context_length(config)
    if context is not None and length > context:
        raise UsageError(f"{what}={length}; this model's context holds {context} tokens: give at most that")


def _require_possible(options: CalibrationOptions, config: Mapping[str, Any]) -> None:
    require_context(config, options.length, "calibration length")
    asked = options.windows * options.length
    if asked > MAX_CALIBRATION_TOKENS:
        raise UsageError(
            f"{options.windows:,} windows of {options.length:,} tokens are {asked:,} tokens; "
            f"allowed are {MAX_CALIBRATION_TOKENS:,}. Usual are 128 windows of 256 to 2,048."
        )


def refuse_inside(model: Path, output: Path) -> None:
    """Raises UsageError for an output (or its run folder) that is the model's folder, or lies in it: a base is never
    written to.
    """
    source = model.resolve()
    for target in (output.resolve(), run_folder(output).resolve()):
        if target == source or source in target.parents:
            raise UsageError(
                f"the output {target.name} lies in the model's own folder {model}; name a folder outside it"
            )


def write_model(run: Run, output: Path, journal: Journal, progress: Progress) -> None:
    """Walks the units that are missing and writes index, config and side files; leaves out card and marker.

    Raises:
        DiskFullError: before any work when the volume cannot hold what is missing, or at the shard that does not fit.
    """
    _require_room(run, output, journal)
    walk(run.job, output, journal, progress)
    _require_sound(run, output, journal)
    schemes = {item.linear.name: item.scheme for item in run.layout.compressions}
    config = dict(run.checkpoint.config)
    own = dense_config(run.checkpoint)
    found = quantization_config(schemes, run.anatomy, run.recipe.storage, run.checkpoint.dtype, why=own.get("why"))
    found = found or own
    if found:  # an empty one is taken for a damaged one
        config["quantization_config"] = found
    if run.recipe.basis is not None:  # adapters and draft heads of the base do not fit, and a measurement has to know
        config[BASIS_KEY] = {"method": run.recipe.basis.name, **to_fields(run.recipe.basis)}
    write_index(output, run.layout.weight_map, total_bytes=sum(_tensor_bytes(run.layout)))
    copy_side_files(run.checkpoint.folder, output)
    replace_side_files(run.checkpoint, output)
    write_json(output / "config.json", config)
    journal.drop_inputs(before=len(run.layout.units) + 1)


def _require_sound(run: Run, output: Path, journal: Journal) -> None:
    """Raises CheckpointError for a shard that is not on the disk as it was written: nothing is said to be finished."""
    sound = journal.sound(output)
    if sound < len(run.layout.units):
        raise CheckpointError(
            f"shard {run.layout.units[sound].shard} in {output} is not what was written there: the disk, or another "
            "program, changed it. Run the same command again: it goes on from that shard"
        )


def marker(run: Run, output: Path, journal: Journal, results: dict[str, Any] | None) -> dict[str, Any]:
    """What `fettle.json` says: recipe, base, calibration, ledger, hashes, results; nothing that differs between
    runs.
    """
    records = journal.records(output)
    ledger = [{k: v for k, v in line.items() if k != "seconds"} for record in records for line in record.ledger]
    return {
        "schema": 1,
        "fettle_version": fettle.__version__,
        "base": {"name": run.model, "files": run.identity["model"]},
        "generic": run.identity["generic"],
        "causal": run.anatomy.causal,
        "recipe": run.identity["recipe"],
        "reshaped": list(run.reshaped) or run.base_is_reshaped,
        **({BEGUN_AFRESH: True} if run.base_begun_afresh else {}),
        "calibration": calibration_summary(run),
        "ledger": ledger,
        "files": {record.shard: record.sha256 for record in records},
        "tensors": {name: digest for record in records for name, digest in record.tensors.items()},
        "results": results,
    }


def calibration_summary(run: Run) -> dict[str, Any] | None:
    """Which text the methods saw; None where none did."""
    if run.text is None or run.windows is None:
        return None
    return {
        "source": Path(run.text.source).name,
        "sha256": run.text.sha256,
        "windows": len(run.windows.ids),
        "length": run.recipe.calibration.length,
        "seed": run.recipe.calibration.seed,
        "note": run.windows.note,
    }


def display_name(model: str | Path) -> str:
    """The name of a model in cards and pages: a hub id or `demo` as it is, of a path the last part."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def versions() -> dict[str, str]:
    """What computed: fettle, torch, transformers, Python, the machine."""
    from importlib.metadata import version

    return {
        "fettle": fettle.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "compressed-tensors": version("compressed-tensors"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def check_device(device: str) -> None:
    """Raises UsageError for a device that torch does not know or this machine does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"unknown device '{device}'. Allowed: cpu, cuda, cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}' is not supported. Allowed: cpu, cuda, cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device '{device}': this machine has no CUDA GPU that torch can use; use --device cpu")
    index = torch.device(device).index
    if kind == "cuda" and index is not None and index >= torch.cuda.device_count():
        raise UsageError(f"device '{device}': this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0")


@contextmanager
def stop_on_signals(output: Path) -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into InterruptedRunError at once; every finished block is on the disk already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise InterruptedRunError(
            f"stopped by {signal.Signals(signum).name}; finished blocks are kept in {run_folder(output)}: run the same "
            "command again to go on"
        )

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tensor_bytes(layout: Layout) -> Iterator[int]:
    for unit in layout.units:
        for dtype, shape in unit.tensors.values():
            yield dtype.itemsize * int(torch.Size(shape).numel())


def _require_room(run: Run, output: Path, journal: Journal) -> None:
    written = len(journal.records(output))
    missing_units = run.layout.units[written:]
    job = run.job
    hidden_bytes = 0
    if missing_units and written <= job.last_data_unit:
        width = run.anatomy.embedding.shape[1] if run.anatomy.embedding else run.anatomy.blocks[0].linears[0].shape[1]
        # this block's inputs and the next one's, of the compressed model and of the original
        hidden_bytes = 2 * 2 * 4 * width * sum(len(ids) for ids in job.windows)
    needed = sum(unit.bytes for unit in missing_units) + hidden_bytes
    free = shutil.disk_usage(output).free
    if needed > free:
        name = missing_units[0].shard if missing_units else MARKER
        raise DiskFullError(
            f"no room for {output / name} and what follows it: {needed:,} bytes are needed and {free:,} are free, "
            f"{needed - free:,} bytes are missing. Free some space and run the same command again; what is written stays."  # noqa: E501
        )


def monotonic_seconds(started: float) -> float:
    """Seconds since `started`, to the millisecond."""
    return round(time.monotonic() - started, 3)
