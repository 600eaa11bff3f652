"""Time and peak memory of compressing one model: fettle and, where they are installed, its peers, side by side.

Each contender runs in a process of its own; wall time is that process's whole life (imports and writing included), peak
memory is what the operating system says it held at most. All get the same folder, text, windows and scheme (int4,
group 128, symmetric). Machines are shared, so a round runs every contender once and rounds are repeated; the medians
and each contender's ratio to fettle's `gptq` in the same round are printed, one JSON line a contender.

    python benchmarks/compression/random_llama.py build/llama-1.1b
    python benchmarks/compression/measure.py build/llama-1.1b --rounds 5 \
        --peer llmcompressor=PATH/TO/PYTHON --peer gptqmodel=PATH/TO/PYTHON
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEERS = Path(__file__).parent / "peers"


def fettle_command(model: Path, output: Path, method: str, windows: int, length: int) -> list[str]:
    """The command line of one fettle run."""
    command = [sys.executable, "-m", "fettle", "compress", str(model), "-o", str(output), "--method", method]
    command += ["--bits", "4", "--group-size", "128", "--no-evaluate", "--json"]
    return command + (["--windows", str(windows), "--length", str(length)] if method == "gptq" else [])


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command; wall seconds and peak memory of that process."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status) != 0:
            log.seek(0)
            sys.exit(f"error: {' '.join(command)} failed:\n{log.read().decode()[-3000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.monotonic() - started, "peak_memory_bytes": usage.ru_maxrss * scale}


def contenders(args: argparse.Namespace, output: Path) -> dict[str, list[str]]:
    """Name → command line of everything that takes part."""
    found = {
        f"fettle {method}": fettle_command(args.model, output, method, args.windows, args.length)
        for method in ("round_to_nearest", "gptq")
        if method in args.methods
    }
    for peer in args.peer:
        name, _, python = peer.partition("=")
        script = PEERS / f"peer_{name}.py"  # another name than the package that it imports
        if not script.exists() or not Path(python).exists():
            allowed = ", ".join(path.stem.removeprefix("peer_") for path in PEERS.glob("*.py"))
            sys.exit(f"error: --peer {peer}: allowed names: {allowed}; then = and a Python")
        found[name] = [
            python,
            str(script),
            str(args.model),
            str(output),
            str(args.windows),
            str(args.length),
            args.text,
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["round_to_nearest", "gptq"])
    parser.add_argument("--peer", action="append", default=[], help="name=python of its virtual environment")
    parser.add_argument(
        "--text", default=str(Path(__file__).parents[2] / "src/fettle/models/reference/calibration.txt")
    )
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.model.parent) as temporary:
        for _ in range(args.rounds):
            for name, command in contenders(args, Path(temporary) / "out").items():
                runs.setdefault(name, []).append(measure(command))
                print(
                    name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True
                )  # a run of hours should not be mute
                for path in Path(temporary).iterdir():
                    shutil.rmtree(path)
    base = runs.get("fettle gptq")
    for name, values in runs.items():
        line = {
            "benchmark": "compression", "model": args.model.name, "contender": name, "rounds": args.rounds,
            "windows": args.windows, "length": args.length,
            "seconds": round(statistics.median(v["seconds"] for v in values), 2),
            "peak_memory_bytes": int(statistics.median(v["peak_memory_bytes"] for v in values)),
        }  # fmt: skip
        if base is not None:
            for key in ("seconds", "peak_memory_bytes"):
                ratios = [v[key] / b[key] for v, b in zip(values, base, strict=True)]
                line[f"{key}_ratio_to_fettle_gptq"] = round(statistics.median(ratios), 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
