"""The native engine beside other engines on random weights in the shape of TinyLlama-1.1B, one JSON line out.

    python benchmarks/engine/beside_peers.py --peer llamacpp=PYTHON --peer ct2=PYTHON [--blocks 4] [--threads 2]
        [--repeats 5] [--only llamacpp:Q4_0 native:uniform4-32 …] [--work prefill decode] [--folder DIR]

A peer's Python has its package installed (llamacpp: llama-cpp-python and gguf; ct2: ctranslate2; ov: openvino; ort:
onnxruntime-genai and onnx); peers/NAME.py makes its file and works when it is told to. All engines are open at the same
time with the same threads, and in each repeat each does the same piece of work in turn: a prompt of 512 tokens, 16
tokens of one sequence, 16 of eight (`--work` takes some of the three: CTranslate2 reads eight prompts twice for the
last, which takes minutes). Medians of the repeats; ratios are medians of each repeat's own, native over peer in tokens
a second, for the pairs of `PAIRS`.
A peer that does not start is left out, with its last line as the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FORMATS = {
    "native": ("uniform4-32", "uniform4-128", "uniform3-32", "uniform2-64", "ternary-256"),
    "llamacpp": ("Q4_0", "Q4_K_M", "Q2_K", "IQ3_S", "TQ2_0"),
    "ct2": ("int8",),
    "ov": ("int4-32", "int4-128"),
    "ort": ("int4-32", "int4-128"),
}
PAIRS = (
    ("native:uniform4-32", "llamacpp:Q4_0"),
    ("native:uniform4-128", "llamacpp:Q4_K_M"),
    ("native:uniform3-32", "llamacpp:IQ3_S"),
    ("native:uniform2-64", "llamacpp:Q2_K"),
    ("native:ternary-256", "llamacpp:TQ2_0"),
    ("native:uniform4-32", "ct2:int8"),
    ("native:uniform4-32", "ov:int4-32"),
    ("native:uniform4-128", "ov:int4-128"),
    ("native:uniform4-32", "ort:int4-32"),
    ("native:uniform4-128", "ort:int4-128"),
)
TOKENS = {"prefill": 512, "decode": 16, "decode8": 128}
SCRIPTS = Path(__file__).parent / "peers"


class Engine:
    """A process that works when it is told to."""

    def __init__(self, name: str, python: str, options: argparse.Namespace) -> None:
        self.name = name
        kind, format = name.split(":")
        command = [python, str(SCRIPTS / f"{kind}.py"), format]
        command += ["--blocks", str(options.blocks), "--threads", str(options.threads)]
        if kind != "native":
            command += ["--folder", str(options.folder)]
        threads = {key: str(options.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | threads,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.told: dict[str, Any] | None = json.loads(line) if line else None

    def reason(self) -> str:
        """Why it did not start."""
        lines = self.process.communicate()[1].strip().splitlines()
        return lines[-1] if lines else f"ended with {self.process.returncode}"

    def seconds(self, work: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{work}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended in the middle: {self.reason()}")
        return float(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(engines: list[Engine], repeats: int, works: list[str]) -> dict[str, dict[str, list[float]]]:
    """Tokens a second by engine and work, a list of repeats; bandwidth and peak under "machine"."""
    found: dict[str, dict[str, list[float]]] = {e.name: {work: [] for work in works} for e in engines}
    machine = next((e for e in engines if e.name.startswith("native")), None)
    limits: dict[str, list[float]] = {"bandwidth": [], "peak": []}
    for _ in range(repeats):
        for work in works:
            if machine is not None and work != "decode8":
                limit, size = ("peak", 1e12) if work == "prefill" else ("bandwidth", float(1 << 28))
                limits[limit].append(size / machine.seconds(limit))
            for engine in engines:
                found[engine.name][work].append(TOKENS[work] / engine.seconds(work))
    return found | {"machine": limits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", nargs="+", metavar="NAME:FORMAT")
    for flag, value in (("--blocks", 22), ("--threads", 2), ("--repeats", 5)):
        parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--work", nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--folder", type=Path, help="where peers' files are kept between runs; by default nowhere")
    options = parser.parse_args()
    pythons = {"native": sys.executable} | dict(peer.split("=", 1) for peer in options.peer)
    with tempfile.TemporaryDirectory() as nowhere:
        options.folder = options.folder or Path(nowhere)
        options.folder.mkdir(parents=True, exist_ok=True)
        names = [f"{kind}:{format}" for kind in pythons for format in FORMATS[kind]]
        wanted = [name for name in names if options.only is None or name in options.only]
        tried = [Engine(name, pythons[name.split(":")[0]], options) for name in wanted]
        engines = [engine for engine in tried if engine.told is not None]
        missing = {engine.name: engine.reason() for engine in tried if engine.told is None}
        rates = measure(engines, options.repeats, options.work)
        for engine in engines:
            engine.close()
    middle = {
        name: {work: round(statistics.median(values), 2) for work, values in of.items() if values}
        for name, of in rates.items()
    }
    for engine in engines:
        assert engine.told is not None
        middle[engine.name] |= {"engine": engine.told["engine"], "bytes": engine.told["bytes"]}
    ratios = {
        f"{own} / {other}": {
            work: round(statistics.median(a / b for a, b in zip(rates[own][work], rates[other][work], strict=True)), 3)
            for work in options.work
        }
        for own, other in PAIRS
        if own in rates and other in rates
    }
    print(json.dumps({
        "benchmark": "beside_peers", "blocks": options.blocks, "threads": options.threads, "repeats": options.repeats,
        "tokens_per_second": middle, "ratios": ratios, "missing": missing,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
