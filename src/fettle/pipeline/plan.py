"""plan: what a run will write, take and need, said before any work, and one block sent through the whole path.

Bytes are exact: the layout knows every tensor's name, type and shape, and a safetensors header is a function of these.
Time and memory are measured, not modelled: the first block goes through load, collect, compress, swap, run and write,
into a temporary folder on the output's volume; the other blocks are taken in proportion to their bytes. What this run
of one block survives (odd shapes, a dtype that cannot be packed, a full disk) the whole run survives.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from fettle.errors import ResourceError
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.pipeline.journal import Journal
from fettle.pipeline.run import Run
from fettle.pipeline.walk import walk
from fettle.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will write, take and need."""

    model: str
    recipe: str
    base_bytes: int
    output_bytes: int  # exact: all shards of the written model
    bits_per_weight: float  # over the compressed linears, everything stored counted; 0 where there are none
    linears: int
    kept_linears: int
    seconds: float  # estimated from one block
    peak_memory_bytes: int  # measured on one block, and the largest shard outside the blocks
    memory_bytes: int  # of this machine
    free_disk_bytes: int
    shards: dict[str, int]
    schemes: dict[str, int]  # scheme → how many linears get it
    calibration_note: str

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        return {"schema": 1, **asdict(self)}


def plan_run(run: Run, progress: Progress, folder: Path | None = None) -> Plan:
    """Predicts a prepared run; sends its first unit through the whole path in a temporary folder under `folder`.

    Raises:
        ResourceError: this machine has less memory than one block needs.
    """
    layout = run.layout
    restart_peak()
    with tempfile.TemporaryDirectory(prefix="fettle-plan-", dir=folder) as temporary:
        output = Path(temporary) / "model"
        with Journal.open(output, run.identity, fresh=False) as journal:
            started = time.monotonic()
            walk(run.job, output, journal, progress, last_unit=0)
            total = time.monotonic() - started
            first = journal.records(output)[0].seconds
        free = shutil.disk_usage(temporary).free
    sources = [_source_bytes(run, index) for index in range(len(layout.units))]
    others = sum(
        size for size, unit in list(zip(sources, layout.units, strict=True))[1:] if unit.block is not None
    ) / max(1, sources[0])
    outside = max((unit.bytes for unit in layout.units if unit.block is None), default=0)
    memory = int(psutil.virtual_memory().total)
    peak = max(peak_memory_bytes(), psutil.Process().memory_info().rss + outside)
    if peak > memory:
        raise ResourceError(
            f"one block needs {peak:,} bytes of memory and this machine has {memory:,}; use fewer or shorter windows "
            f"(now {run.recipe.calibration.windows} of {run.recipe.calibration.length}), or a method without calibration"  # noqa: E501
        )
    schemes: dict[str, int] = {}
    for item in layout.compressions:
        schemes[item.scheme.describe()] = schemes.get(item.scheme.describe(), 0) + 1
    weights = sum(item.linear.shape[0] * item.linear.shape[1] for item in layout.compressions)
    stored = sum(item.scheme.stored_bytes(item.linear.shape, layout.storage_of(item)) for item in layout.compressions)
    return Plan(
        model=run.model,
        recipe=run.recipe.name,
        base_bytes=sum((run.checkpoint.folder / shard).stat().st_size for shard in run.checkpoint.shards),
        output_bytes=layout.bytes,
        bits_per_weight=8 * stored / weights if weights else 0.0,
        linears=len(layout.compressions),
        kept_linears=sum(1 for _ in run.anatomy.linears())
        - sum(c.linear.block is not None for c in layout.compressions),
        seconds=total + first * others,
        peak_memory_bytes=peak,
        memory_bytes=memory,
        free_disk_bytes=free,
        shards={unit.shard: unit.bytes for unit in layout.units},
        schemes=schemes,
        calibration_note=run.windows.note if run.windows is not None else "no method of this recipe looks at data",
    )


def _source_bytes(run: Run, index: int) -> int:
    unit = run.layout.units[index]
    names = [*unit.kept, *(item.linear.weight_name for item in unit.compressed)]
    return sum(run.checkpoint.entries[name].nbytes for name in names)
