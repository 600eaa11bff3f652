"""Kill one compression at random moments and show that every resumed run writes the same bytes.

An undisturbed run is made first. Then, for each of `--kills` moments drawn evenly over its length, a run is started
in a fresh
folder, killed with SIGKILL at that moment, and run again to its end; the written folder is compared with the
undisturbed one, file by file, byte by byte. After the kill the folder must not look finished: no `fettle.json`.

    python benchmarks/compression/kills.py --kills 20
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


def command(model: str, output: Path, recipe: str) -> list[str]:
    """One compression, measured afterwards so that the card is part of the comparison."""
    return [
        sys.executable,
        "-m",
        "fettle",
        "compress",
        model,
        "-o",
        str(output),
        "--recipe",
        recipe,
        "--windows",
        "16",
        "--length",
        "128",
        "--evaluate",
        "--json",
    ]


def digests(folder: Path) -> dict[str, str]:
    """Relative name → SHA-256 of every file in the written folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="gptq-4bit")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        started = time.monotonic()
        subprocess.run(
            command(args.model, root / "whole" / "model", args.recipe), check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.monotonic() - started
        expected = digests(root / "whole" / "model")
        identical = looked_finished = killed_after_end = 0
        progress = []
        for number in range(args.kills):
            output = root / f"killed-{number}" / "model"
            process = subprocess.Popen(command(args.model, output, args.recipe), stdout=subprocess.DEVNULL)
            try:
                process.wait(timeout=moments.uniform(0.02, 1.0) * seconds)
                killed_after_end += 1
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                looked_finished += (output / "fettle.json").exists() and digests(output) != expected
            journal = output.parent / "model.run" / "journal.jsonl"
            progress.append(len(journal.read_text().splitlines()) if journal.exists() else 0)
            subprocess.run(command(args.model, output, args.recipe), check=True, stdout=subprocess.DEVNULL)
            identical += digests(output) == expected
    print(
        json.dumps(
            {
                "benchmark": "kills", "model": args.model, "recipe": args.recipe, "kills": args.kills,
                "identical": identical, "looked_finished_after_kill": looked_finished,
                "ended_before_the_kill": killed_after_end, "shards_done_at_the_kill": progress,
                "undisturbed_seconds": round(seconds, 1), "files_compared": len(expected),
            }
        )
    )  # fmt: skip
    sys.exit(0 if identical == args.kills and not looked_finished else 1)


if __name__ == "__main__":
    main()
