"""Peak memory of a few training steps, each kind in a process of its own: full fine-tuning, LoRA, QLoRA.

python benchmarks/quality/training_memory.py       (the embedded model, which shows that it runs)

python benchmarks/compression/random_llama.py build/llama-1.1b
fettle compress build/llama-1.1b -o build/llama-1.1b-4bit --method round_to_nearest --bits 4 --group-size 128
python benchmarks/quality/training_memory.py build/llama-1.1b build/llama-1.1b-4bit --blocks 2

python benchmarks/quality/training_memory.py build/llama-1.1b --kinds full,ddp,fsdp --blocks 4

`ddp` and `fsdp` are full fine-tuning by two processes (`--processes`), a window each: with all of the model in both,
and with `shard`. What counts there is the larger process.

Every kind takes the same windows with gradient checkpointing, and writes its result like any training. The peak is
what the operating system says that the process held at most, libraries included; `--blocks N` cuts both models to
their first N blocks, for a machine too small for full fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "compression"))
from measure import measure

import fettle
from fettle.evaluate.memory import peak_memory_bytes
from fettle.methods.train import Adapter, Distill
from fettle.methods.train.processes import process_count
from fettle.methods.train.training import TrainJob, train
from fettle.models.checkpoint import Checkpoint
from fettle.models.source import resolve
from fettle.models.writer import copy_side_files, write_json, write_shard
from fettle.pipeline.recipe import parse_recipe

KINDS = {"full": "dense", "ddp": "dense", "fsdp": "dense", "lora": "dense", "qlora": "codes"}
TOGETHER = ("ddp", "fsdp")
FOLDER = "TRAINING_MEMORY_FOLDER"  # tells processes that work together of their one folder


def method(kind: str, **fields: Any) -> Any:
    """The training of one kind; hard labels, so that no teacher is in memory."""
    if kind in ("full", *TOGETHER):
        return Distill(**fields, hard=1.0, soft=0.0, learning_rate=1e-5, shard=kind == "fsdp")
    return Adapter(**fields, rank=8, learning_rate=1e-4)


def first_blocks(model: Path, blocks: int, output: Path) -> Path:
    """A folder with the first blocks of a checkpoint, and everything outside of blocks."""
    output.mkdir()
    checkpoint = Checkpoint.open(model)
    kept = {name: checkpoint.read(name) for name in checkpoint.entries if _block(name) < blocks}
    write_shard(output, "model.safetensors", kept, {"format": "pt"})
    copy_side_files(model, output)
    write_json(output / "config.json", {**checkpoint.config, "num_hidden_layers": blocks})
    return output


def in_codes(model: Path, output: Path) -> Path:
    """The model in 4 bits."""
    step = {"method": "round_to_nearest", "bits": 4, "group_size": 128}
    fettle.compress(model, output, parse_recipe({"name": "codes", "steps": [step]}, "bench"), evaluate=False)
    return output


def _block(name: str) -> int:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def one(kind: str, model: Path, steps: int, length: int) -> None:
    """The process that is measured; says its peak before the result is written, too."""
    processes = process_count()
    fields = {
        "steps": steps, "batch_windows": processes, "windows": steps * processes, "length": length, "held_back": 0,
        "warmup": 0.0, "checkpoint_every": 10**6, "gradient_checkpointing": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as own:
        folder = Path(os.environ.get(FOLDER, own))  # processes that work together have one folder
        job = TrainJob(model=model, original=model, output=folder / "out", folder=folder / "run")
        curve = train(method(kind, **fields), job)
    print(json.dumps({"losses": curve.losses, "peak_memory_bytes": peak_memory_bytes()}))


def main() -> None:
    """Runs the kinds one after the other and prints one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, nargs="?", help="none for the embedded model")
    parser.add_argument("codes", type=Path, nargs="?", help="the same in codes; none for round to nearest, 4 bits")
    parser.add_argument("--kinds", default="full,lora,qlora")
    parser.add_argument("--processes", type=int, default=2, help="of ddp and fsdp")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--blocks", type=int, help="of both models; none for all")
    parser.add_argument("--one", help="a kind: train in this process (the others are started so)")
    a = parser.parse_args()
    if a.one:
        one(a.one, getattr(a, KINDS[a.one]), a.steps, a.length)
        return
    full = None
    with tempfile.TemporaryDirectory() as temporary:
        dense = a.dense or resolve("demo")
        kinds, folders = a.kinds.split(","), {"dense": dense}
        if any(KINDS[kind] == "codes" for kind in kinds):
            folders["codes"] = a.codes or in_codes(dense, Path(temporary) / "codes")
        if a.blocks:
            folders = {k: first_blocks(v, a.blocks, Path(temporary) / f"cut-{k}") for k, v in folders.items()}
        for kind in kinds:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(a.processes)]
            command = [sys.executable, *(launcher if kind in TOGETHER else []), __file__]
            command += [str(folders["dense"]), str(folders.get("codes", dense)), "--one", kind]
            command += ["--steps", str(a.steps), "--length", str(a.length)]
            if kind in TOGETHER:
                os.environ[FOLDER] = str(Path(temporary) / kind)
            started = time.monotonic()
            found = measure(command)  # of a launcher: the largest of what it started
            os.environ.pop(FOLDER, None)
            full = found["peak_memory_bytes"] if kind == "full" else full
            line = {
                "name": kind, "blocks": a.blocks, "steps": a.steps, "length": a.length,
                "seconds": round(time.monotonic() - started, 1), "peak_gb": round(found["peak_memory_bytes"] / 1e9, 3),
                "times_full": None if full is None else round(found["peak_memory_bytes"] / full, 3),
            }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
