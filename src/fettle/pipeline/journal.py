"""The run folder: what a compression needs to go on after a kill, and what it may tell that no two runs share.

`OUT.run/` stands beside the written model `OUT/`:

    identity.json       what the run was started with; another model, recipe, seed or text is refused, by name
    journal.jsonl       one line a finished shard, appended and flushed to the disk after the shard itself, with the
                        seconds, which differ from run to run
    inputs-000N.safetensors   the hidden states that enter block N: the one thing that cannot be read from OUT
    report.html summary.json  written at the end

`OUT/` itself holds nothing that depends on when or how often the run was interrupted: a killed and resumed run writes
the same bytes as an undisturbed one. A torn last line of the journal (the kill came while it was written) is dropped;
its shard is
written again, with the same bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.errors import ResumeError, UsageError
from fettle.models.checkpoint import file_sha256
from fettle.models.writer import is_side_file, write_json, write_shard

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs on one folder are then the user's to avoid
    fcntl = None  # type: ignore[assignment]


_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|\..*\.partial")  # all that a run leaves before it is done
_OUTPUT = re.compile(rf"{_SHARD.pattern}|model\.safetensors\.index\.json|config\.json|README\.md|fettle\.json")
SHA256_LETTERS = 64
_RUN = re.compile(
    r"identity\.json|journal\.jsonl(\.tmp)?|inputs-\d{5}\.safetensors|summary\.json|report\.html|\..*\.partial"
)


@dataclass(frozen=True, kw_only=True)
class LedgerLine:
    """One decision: what was done to one linear, and what it cost."""

    linear: str
    block: int | None
    role: str
    method: str
    scheme: str
    error: float  # relative; of the outputs where a gram was collected, else of the weights
    objective: str
    bits_per_weight: float
    seconds: float
    note: str = ""

    def deterministic(self) -> dict[str, Any]:
        """Everything but the seconds: what may stand in the written model."""
        line = asdict(self)
        del line["seconds"]
        return line


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard of the written model."""

    unit: int
    shard: str
    sha256: str
    bytes: int
    tensors: dict[str, str]  # tensor name → sha256 of its bytes
    ledger: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of the whole unit, reading and running the block included


class Journal:
    """The open run folder of one compression; see the module's text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, output: Path, identity: Mapping[str, Any], *, fresh: bool) -> Iterator[Journal]:
        """Opens or makes `OUT.run/` and holds its lock.

        Raises:
            ResumeError: the folder belongs to a run with another identity; the message names each field.
            UsageError: another process works on it, or `output` holds files that fettle did not write.
        """
        folder = run_folder(output)
        known = (folder / "identity.json").exists()
        refuse_foreign(output)
        with locked(folder):
            journal = cls(folder)
            if known and fresh and (journal.owns(output) or (output / "fettle.json").is_file()):
                journal.clear(output)
            elif known and not fresh and journal.owns(output):
                journal.refuse_changes(identity)
                journal.drop_damaged(output)
            elif known:  # nothing is done, so nothing is resumed, and what lies there was not written by this run
                journal.refuse_strangers(output)
                journal.clear(output)
            output.mkdir(parents=True, exist_ok=True)
            write_json(folder / "identity.json", dict(identity))
            yield journal

    def clear(self, output: Path) -> None:
        """Removes what earlier runs wrote to `output` and to the run folder, and nothing else."""
        self._clear_output(output, keep=())
        for path in self.folder.iterdir():
            if path.is_file() and _RUN.fullmatch(path.name):
                path.unlink()

    def _clear_output(self, output: Path, keep: Collection[str]) -> None:
        for path in output.iterdir() if output.is_dir() else ():
            own = _OUTPUT.fullmatch(path.name) or is_side_file(path)
            if own and path.is_file() and path.name not in keep:
                path.unlink()

    def owns(self, output: Path) -> bool:
        """Whether `output` holds a shard that this run finished, or says so: what fettle writes there is its own."""
        path = output / "fettle.json"
        told = path.read_bytes() if path.is_file() else b""
        return any(_has_length(output, x) or x.sha256.encode() in told for x in self._written())

    def drop_damaged(self, output: Path) -> None:
        """Forgets every record from the first on whose shard is lost or has other bytes, and removes what came after
        it: a folder that is not whole must not look finished.
        """
        sound = self.sound(output)
        written = self._written()
        if sound < len(written):
            self.keep(sound, output)
            self._clear_output(output, keep=[record.shard for record in written[:sound]])

    def sound(self, output: Path) -> int:
        """How many shards, from the first on, are byte for byte what was written; reads them all."""
        records = self.records(output)
        bad = (i for i, record in enumerate(records) if file_sha256(output / record.shard) != record.sha256)
        return next(bad, len(records))

    def refuse_strangers(self, output: Path) -> None:
        """Raises UsageError where `output` holds more than a run that finished no shard can have left."""
        for path in sorted(output.iterdir()) if output.is_dir() else ():
            if not _SHARD.fullmatch(path.name):
                raise UsageError(
                    f"the output {output} holds {path.name}, which the run that began there did not write; name "
                    "another folder, or empty this one"
                    f"{', or give --fresh to start over' if (output / 'fettle.json').is_file() else ''}"
                )

    def refuse_changes(self, identity: Mapping[str, Any]) -> None:
        """Raises ResumeError when the run was started with something else."""
        path = self.folder / "identity.json"
        try:
            started = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ResumeError(
                f"{path} is damaged ({error}), so nobody knows what the run was started with; give --fresh to start "
                "over, or another output folder"
            ) from error
        before, now = dict(_flatten(started)), dict(_flatten(identity))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            told = "; ".join(f"{key}: was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed[:5])
            raise ResumeError(
                f"the run in {self.folder} was started with something else: {told}"
                f"{f' (and {len(changed) - 5} more)' if len(changed) > 5 else ''}. "
                "Give what it was started with, another output folder, or --fresh to start over."
            )

    def records(self, output: Path) -> list[ShardRecord]:
        """The finished shards, in order, up to the first that is missing or of another length in `output`."""
        records: list[ShardRecord] = []
        for record in self._written():
            if record.unit != len(records) or not _has_length(output, record):
                break
            records.append(record)
        return records

    def _written(self) -> list[ShardRecord]:
        """What the journal says, up to the first line that is no record."""
        path = self.folder / "journal.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return list(itertools.takewhile(lambda record: record is not None, map(_record, lines)))  # type: ignore[arg-type]

    def keep(self, count: int, output: Path) -> None:
        """Forgets every record but the first `count`, and a torn last line."""
        records = self.records(output)[:count]
        temporary = self.folder / "journal.jsonl.tmp"
        temporary.write_text("".join(json.dumps(asdict(r)) + "\n" for r in records), encoding="utf-8")
        temporary.replace(self.folder / "journal.jsonl")

    def append(self, record: ShardRecord) -> None:
        """Adds one finished shard, durably."""
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save_inputs(self, unit: int, hidden: list[Tensor]) -> None:
        """Keeps the hidden states that enter unit `unit`; to be called before the unit before it is journalled."""
        states = {f"{i:06d}": state.cpu().contiguous() for i, state in enumerate(hidden)}
        write_shard(self.folder, _inputs_name(unit), states)

    def load_inputs(self, unit: int) -> list[Tensor] | None:
        """The hidden states that enter block `unit`, or None where they were not kept."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / _inputs_name(unit)
        if not path.is_file():
            return None
        try:
            states = load_file(path)
        except SafetensorError:  # damaged is as good as lost
            return None
        # Fresh tensors: a view into the file's buffer may be aligned otherwise, and sums may then round otherwise.
        return [torch.empty_like(states[key]).copy_(states[key]) for key in sorted(states)]

    def drop_inputs(self, before: int) -> None:
        """Removes the hidden states that enter units before `before`."""
        for path in self.folder.glob("inputs-*.safetensors"):
            if path.name < _inputs_name(before):
                path.unlink()


def _record(line: bytes) -> ShardRecord | None:
    """What one line of the journal says; None where it is torn, or no record."""
    try:
        record = ShardRecord(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = (
        (record.unit, int), (record.shard, str), (record.sha256, str), (record.bytes, int), (record.tensors, dict),
        (record.ledger, list), (record.seconds, int | float),
    )  # fmt: skip
    whole = all(isinstance(value, kind) for value, kind in kinds) and all(isinstance(x, dict) for x in record.ledger)
    return record if whole and _SHARD.fullmatch(record.shard) and len(record.sha256) == SHA256_LETTERS else None


def _has_length(output: Path, record: ShardRecord) -> bool:
    shard = output / record.shard
    return shard.is_file() and shard.stat().st_size == record.bytes


def _inputs_name(unit: int) -> str:
    return f"inputs-{unit:05d}.safetensors"


def run_folder(output: Path) -> Path:
    """`OUT.run`, beside `OUT`."""
    return output.parent / f"{output.name}.run"


def refuse_foreign(output: Path) -> None:
    """Raises UsageError where `output` or its run folder is a file, or it holds files that no run of fettle's wrote."""
    for path in (output, run_folder(output)):
        if path.exists() and not path.is_dir():
            raise UsageError(f"the output {path} is a file; name a folder that does not exist yet")
    known = (run_folder(output) / "identity.json").exists()
    if not known and output.is_dir() and any(output.iterdir()):
        raise UsageError(f"the output {output} is not empty and no fettle run made it; name another folder")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{prefix}[{index}]")
    else:
        yield prefix, value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the run folder and holds its lock; UsageError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"another run works on {folder}; wait for it or name another output") from None
        yield
