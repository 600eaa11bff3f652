"""Kill one compression, or a chain of trainings, at random moments: every resumed run writes the same bytes.

An undisturbed run is made first. Then, for each of `--kills` moments drawn evenly over its length, a run is started in
a fresh folder, killed with SIGKILL at that moment, and run again to its end; the written folder is compared with the
undisturbed one, file by file, byte by byte. After the kill the folder must not look finished: no `fettle.json`. Of a
chain the losses of all trainings are compared as well.

    python benchmarks/compression/kills.py --kills 20
    python benchmarks/compression/kills.py --chain --kills 10
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHAIN = """
name: prune, heal, round
stages:
  - compress: {calibration: {windows: 16, length: 128}, steps: [{method: magnitude, sparsity: 0.5}]}
  - {train: distill, keep_zeros: true, steps: 24, windows: 96, batch_windows: 4, length: 64, checkpoint_every: 4}
  - compress:
      calibration: {windows: 16, length: 128}
      steps: [{method: sparsegpt, sparsity: 0.5, correction: 0.0, bits: 4}]
"""


def command(model: str, output: Path, recipe: str | Path) -> list[str]:
    """One compression, measured afterwards so that the card is part of the comparison; or one chain."""
    started = [sys.executable, "-m", "fettle"]
    if isinstance(recipe, Path):
        return [*started, "train", model, "-o", str(output), "--recipe", str(recipe), "--no-evaluate", "--json"]
    shape = ["--windows", "16", "--length", "128"]
    return [*started, "compress", model, "-o", str(output), "--recipe", recipe, *shape, "--evaluate", "--json"]


def progress(output: Path) -> int:
    """Blocks of a compression that are done, or stages of a chain."""
    journal, stages = output.parent / "model.run" / "journal.jsonl", output.parent / "model.run" / "stages"
    if stages.is_dir():
        return len(list(stages.glob("*.json")))
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def losses(output: Path) -> list[object]:
    """All losses of a chain's trainings; none of a compression."""
    path = output.parent / "model.run" / "training.json"
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else []
    return [stage["curve"][key] for stage in stages if stage.get("curve") for key in ("losses", "held_back")]


def digests(folder: Path) -> dict[str, str]:
    """Relative name → SHA-256 of every file in the written folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def killed(args: argparse.Namespace, output: Path, recipe: str | Path, after: float) -> dict[str, int]:
    """Starts a run, kills it `after` seconds, and runs it to its end; what the kill found."""
    process = subprocess.Popen(
        command(args.model, output, recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ended = 0
    try:
        process.wait(timeout=after)
        ended = 1
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = {"ended": ended, "done": progress(output), "marked": int((output / "fettle.json").exists())}
    told = digests(output) if found["marked"] else {}
    subprocess.run(
        command(args.model, output, recipe), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return {**found, "torn": int(bool(told) and told != digests(output))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="gptq-4bit")
    parser.add_argument("--chain", action="store_true", help="prune, heal, round to 4 bits, in place of one recipe")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        recipe: str | Path = args.recipe
        if args.chain:
            recipe = root / "chain.yaml"
            recipe.write_text(CHAIN, encoding="utf-8")
        whole = root / "whole" / "model"
        started = time.monotonic()
        subprocess.run(command(args.model, whole, recipe), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        expected = (digests(whole), losses(whole))
        found, identical = [], 0
        for number in range(args.kills):
            output = root / f"killed-{number}" / "model"
            found.append(killed(args, output, recipe, moments.uniform(0.02, 1.0) * seconds))
            identical += (digests(output), losses(output)) == expected
    torn = sum(each["torn"] for each in found)
    line = {
        "benchmark": "kills", "model": args.model, "recipe": "chain" if args.chain else args.recipe,
        "kills": args.kills, "identical": identical, "looked_finished_after_kill": torn,
        "ended_before_the_kill": sum(each["ended"] for each in found), "done_at_the_kill": [x["done"] for x in found],
        "undisturbed_seconds": round(seconds, 1), "files_compared": len(expected[0]),
        "last_losses": [each[-1] for each in expected[1]],
    }  # fmt: skip
    print(json.dumps(line))
    sys.exit(0 if identical == args.kills and not torn else 1)


if __name__ == "__main__":
    main()
