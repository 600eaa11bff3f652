"""How long the native engine takes to open a checkpoint whose files are in the page cache, one JSON line out.

    python benchmarks/engine/loading.py FOLDER [--threads 2] [--repeats 5]

"first" is the first opening in the process, which imports what the model's family needs of transformers; the others
are the median of `--repeats` further ones. Phases of an opening, by wall time: hashes are compared with those of
fettle.json on a thread beside the others, and reading with the layout is what the table takes without it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import time
from pathlib import Path

from fettle.engine.native_runner import NativeRunner
from fettle.engine.native_table import TableReader
from fettle.kernels.native import plane
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def opening(folder: Path, threads: int) -> dict[str, float]:
    began, used = time.perf_counter(), processor_seconds()
    runner = NativeRunner.open(folder, pages=64, threads=threads)
    return {
        "wall": time.perf_counter() - began,
        "processor": processor_seconds() - used,
        "megabytes": runner.weight_bytes / 1e6,
    }


def phases(folder: Path, threads: int) -> dict[str, float]:
    """Each phase of an opening alone, one after another."""
    marks = [time.perf_counter()]
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint)
    marks.append(time.perf_counter())
    reader = TableReader(checkpoint, anatomy, plane().Pool(threads))
    marks.append(time.perf_counter())
    checkpoint.verify_hashes()
    marks.append(time.perf_counter())
    for name in checkpoint.entries:
        checkpoint.read(name)
    marks.append(time.perf_counter())
    reader.read()
    marks.append(time.perf_counter())
    names = ("headers", "module_tree", "hashes", "reading_alone", "reading_and_layout")
    return dict(zip(names, (after - before for before, after in itertools.pairwise(marks)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    first = opening(options.folder, options.threads)
    warm = [opening(options.folder, options.threads) for _ in range(options.repeats)]
    alone = [phases(options.folder, options.threads) for _ in range(options.repeats)]
    print(json.dumps({
        "benchmark": "engine/loading", "threads": options.threads, "megabytes": round(first["megabytes"], 1),
        "first_seconds": round(first["wall"], 2),
        "wall_seconds": round(statistics.median(each["wall"] for each in warm), 2),
        "processor_seconds": round(statistics.median(each["processor"] for each in warm), 2),
        "wall_range": [round(pick(each["wall"] for each in warm), 2) for pick in (min, max)],
        "phases": {name: round(statistics.median(each[name] for each in alone), 3) for name in alone[0]},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
