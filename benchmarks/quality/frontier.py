"""Bits per weight against what was lost: fettle's methods and, where they are installed, their peers, in one run.

All quantize the linears of the blocks and nothing else, see the same calibration tokens, and are measured by the same
`fettle.evaluate` on the same held-out text, with the original as reference: KL, perplexity, share of equal first
choices. A peer runs in its own environment through the script of its name in `peers/`, which writes its dequantized
weights and counts its bits (`peers/exchange.py` says how). One JSON line a result; finished ones are kept in
`--results`, so that a rerun goes on where it stopped. At the end a table, the ratios to each peer, and a plot.

    python benchmarks/quality/frontier.py demo --peer hqq=PATH/TO/PYTHON --peer autoround=PATH/TO/PYTHON
    python benchmarks/quality/frontier.py ../shared/assets/models/stories260K \
        --calibration ../shared/assets/corpora/tinystories/train_a.txt \
        --text ../shared/assets/corpora/tinystories/valid.txt --recipe mine.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frontier_page
import numpy as np
import torch
from frontier_mixes import Mix, mixes

import fettle
from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import Windows, calibration_windows, read_text
from fettle.methods.train import Qat
from fettle.methods.train.training import TrainJob, train
from fettle.models.source import resolve
from fettle.pipeline.recipe import Recipe, load_recipe, parse_recipe
from fettle.search.budget import Budget

sys.path.append(str(Path(__file__).parent / "peers"))
from exchange import linear_shapes, pad_model, read_tensors

PEER_SCRIPTS = Path(__file__).parent / "peers"
WIDTHS = (2, 3, 4, 8)
EVALUATION_LENGTH = 512
Row = dict[str, Any]

# name → recipe fields beside `bits`; peers store float16 scales, and so do these
OURS: dict[str, dict[str, Any]] = {
    "round_to_nearest g32": {"method": "round_to_nearest", "group_size": 32, "asymmetric": True},
    "gptq g32": {"method": "gptq", "group_size": 32, "asymmetric": True},
    "gptq g64": {"method": "gptq", "group_size": 64, "asymmetric": True},
    "gptq g128": {"method": "gptq", "group_size": 128, "asymmetric": True},
    "gptq g32 symmetric": {"method": "gptq", "group_size": 32, "asymmetric": False},
    "hqq g32": {"method": "hqq", "group_size": 32, "asymmetric": True},
    "learned_rounding g32": {"method": "learned_rounding", "group_size": 32, "asymmetric": True},
    "gptq normal_float g32": {"method": "gptq", "grid": "normal_float", "group_size": 32},
}
# codes of eight weights, at the widths that they come in
VECTORS: dict[str, dict[str, Any]] = {
    "residual_codebooks": {"method": "residual_codebooks"},
    "residual_codebooks float8": {"method": "residual_codebooks", "scale_dtype": "float8_e4m3fn"},
}
VECTOR_WIDTHS = (2, 3, 4)


@dataclass(frozen=True)
class Variant:
    """One way of calling a peer at one width."""

    label: str
    width: int
    group_size: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def each_width(label: str, group_size: int, **options: Any) -> list[Variant]:
    """The same call at every width."""
    return [Variant(label, width, group_size, options) for width in WIDTHS]


def llama_types(**types: tuple[str, ...]) -> list[Variant]:
    """One variant a type or mix of llama.cpp; keywords are w2, w3 … Its script pads rows itself."""
    return [Variant(name, int(width[1:]), 1, {"type": name}) for width, names in types.items() for name in names]


PEERS: dict[str, list[Variant]] = {
    "autoround": [*each_width("g32", 32), *each_width("g32 symmetric", 32, symmetric=True)],
    "hqq": [*each_width("g32", 32), *each_width("g64", 64)],
    "gptqmodel": [*each_width("g32", 32), *each_width("g32 act-order", 32, desc_act=True)],
    "llmcompressor": [*each_width("gptq g32", 32), *each_width("awq g32", 32, awq=True)],
    "llamacpp": llama_types(
        w2=("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K_pure", "Q2_K"), w3=("IQ3_XXS", "IQ3_S", "Q3_K", "Q3_K_M"),
        w4=("IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K", "Q4_K_M"), w8=("Q8_0",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """Something that may be run: who, under what name and key, and the function that measures it."""

    method: str
    ours: bool
    key: str  # of the result: changes when what would be done changes
    measure: Callable[[], Row]


class Bench:
    """One model, its calibration tokens and its text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = resolve(args.model)
        self.name = Path(args.model).name
        text = read_text(args.calibration)
        self.windows: Windows = calibration_windows(
            load_tokenizer(self.folder), text, windows=args.windows, length=args.length, seed=0
        )
        heldout = read_text(args.text, variant="heldout")
        self.settings = {
            "model": self.name, "calibration_sha256": text.sha256, "text_sha256": heldout.sha256,
            "windows": args.windows, "length": args.length, "tokens": args.tokens,
        }  # fmt: skip
        linears = linear_shapes(self.folder)
        self.linear_weights = sum(rows * columns for rows, columns in linears.values())
        self.other_bytes = sum(
            t.numel() * t.element_size() for name, t in read_tensors(self.folder).items() if name not in linears
        )

    def contenders(self) -> Iterator[Contender]:
        """Everything that takes part, fettle first."""
        for width in self.args.bits:
            for label, fields in (OURS | VECTORS if width in VECTOR_WIDTHS else OURS).items():
                step = {"scale_dtype": "float16", **fields, "bits": width}
                yield self._of_recipe(parse_recipe({"name": label, "steps": [step]}, "frontier"), width)
            for mix in mixes(width):
                yield self._of_mix(mix)
        for path in self.args.recipe:
            yield self._of_recipe(load_recipe(path), None)
        for name, python in self.args.peers.items():
            for variant in PEERS[name]:
                if variant.width in self.args.bits:
                    yield self._of_peer(name, python, variant)

    def _key(self, **what: Any) -> str:
        return hashlib.sha256(json.dumps([self.settings, what], sort_keys=True).encode()).hexdigest()[:16]

    def _of_recipe(self, recipe: Recipe, width: int | None) -> Contender:
        calibration = dataclasses.replace(
            recipe.calibration, windows=self.args.windows, length=self.args.length, seed=0, text=self.args.calibration
        )
        recipe = dataclasses.replace(recipe, calibration=calibration)
        plain = recipe.to_dict() | {"calibration": {"order": calibration.order}}

        def measure() -> Row:
            with tempfile.TemporaryDirectory() as temporary:
                output = Path(temporary) / "out"
                started = time.monotonic()
                fettle.compress(self.args.model, output, recipe, evaluate=False, threads=self.args.threads)
                row = {"seconds": round(time.monotonic() - started, 2), "version": fettle.__version__}
                row |= self.evaluate(output)
                return row | {"width": width or nearest_width(row["bits_per_weight"])}

        return Contender(recipe.name, True, self._key(recipe=plain), measure)

    def _of_mix(self, mix: Mix) -> Contender:
        what = {"budget": mix.bits_per_weight, "candidates": mix.candidates}
        key = self._key(**what) if mix.training is None else self._key(**what, training=mix.training)

        def measure() -> Row:
            folder = self._mixed(mix, self._key(**what))
            seconds = mixing_seconds(folder)
            with tempfile.TemporaryDirectory() as temporary:
                if mix.training is not None:
                    started = time.monotonic()
                    folder = self._trained(folder, Path(temporary), mix.training)
                    seconds += time.monotonic() - started
                row = {"seconds": round(seconds, 2), "version": fettle.__version__, "width": mix.width}
                return row | self.evaluate(folder)

        return Contender(mix.label, True, key, measure)

    def _mixed(self, mix: Mix, key: str) -> Path:
        """The folder that the budget gives; made once and kept."""
        output: Path = self.args.results.parent / "mixes" / key
        if not output.with_suffix(".seconds").is_file():
            calibration = {"windows": self.args.windows, "length": self.args.length, "text": self.args.calibration}
            # of the recipe a budget takes the calibration alone
            recipe = parse_recipe(
                {"name": "mix", "steps": [{"method": "gptq"}], "calibration": calibration}, "frontier"
            )
            budget = Budget(bits_per_weight=mix.bits_per_weight, candidates=mix.candidates)
            started = time.monotonic()
            fettle.compress(self.args.model, output, recipe, budget=budget, evaluate=False, threads=self.args.threads)
            output.with_suffix(".seconds").write_text(str(time.monotonic() - started), encoding="utf-8")
        return output

    def _trained(self, model: Path, temporary: Path, fields: dict[str, Any]) -> Path:
        """The mix, trained on the calibration windows: the same draw from the same text, of which none is held back."""
        output = temporary / "trained"
        windows = {"windows": self.args.windows, "length": self.args.length, "seed": 0, "text": self.args.calibration}
        job = TrainJob(model=model, original=self.args.model, output=output, folder=temporary / "run")
        train(Qat(**windows, **fields), job)
        return output

    def _of_peer(self, name: str, python: str, variant: Variant) -> Contender:
        def measure() -> Row:
            with tempfile.TemporaryDirectory() as temporary:
                output = Path(temporary) / "out"
                ids, job = Path(temporary) / "ids.npy", Path(temporary) / "job.json"
                np.save(ids, torch.stack(self.windows.ids).numpy())
                padded = pad_model(self.folder, Path(temporary) / "padded", variant.group_size)
                content = {
                    "model": str(padded), "original": str(self.folder), "ids": str(ids), "output": str(output),
                    "bits": variant.width, "group_size": variant.group_size, "threads": self.args.threads,
                    "options": variant.options,
                }  # fmt: skip
                job.write_text(json.dumps(content), encoding="utf-8")
                run_peer([python, str(PEER_SCRIPTS / f"peer_{name}.py"), str(job)], temporary, self.args.threads)
                told = json.loads((output / "peer.json").read_text(encoding="utf-8"))
                row = self.evaluate(output) | told
                size = told["bits_per_weight"] * self.linear_weights / 8 + self.other_bytes
                return row | {"bytes": round(size), "width": variant.width}

        options = dataclasses.asdict(variant) | {"label": None}
        return Contender(f"{name} {variant.label}", False, self._key(peer=name, **options), measure)

    def evaluate(self, folder: Path) -> Row:
        """The figures of a written folder against the original."""
        found = fettle.evaluate(
            folder, reference=self.args.model, text=self.args.text, length=EVALUATION_LENGTH,
            max_tokens=self.args.tokens, threads=self.args.threads,
        )  # fmt: skip
        return {
            "bits_per_weight": found.bits_per_weight, "bytes": found.bytes, "kl_mean": found.kl_mean,
            "perplexity": found.perplexity, "top1_agreement": found.top1_agreement,
            "reference_perplexity": found.reference_perplexity, "tokens": found.tokens,
        }  # fmt: skip


def run_peer(command: list[str], folder: str, threads: int) -> None:
    """Runs a peer's script away from the network, in a folder that is thrown away.

    Raises:
        RuntimeError: it failed; holds the end of what it printed.
    """
    count = str(threads)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")


def mixing_seconds(folder: Path) -> float:
    """What choosing and compressing a mix took when it was made."""
    return float(folder.with_suffix(".seconds").read_text(encoding="utf-8"))


def nearest_width(bits: float) -> int:
    """The width whose rows a result stands with."""
    return min(WIDTHS, key=lambda width: abs(width - bits))


def read_results(path: Path) -> dict[str, Row]:
    """Key → row of every finished result; the last of a key counts, and a line cut short is passed over."""
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["key"]] = row
    return rows


def run_all(bench: Bench, args: argparse.Namespace) -> list[Row]:
    """Measures what is not measured yet; every row of this run's contenders."""
    results: Path = args.results
    known, rows = read_results(results), []
    results.parent.mkdir(parents=True, exist_ok=True)
    for contender in bench.contenders():
        row = known.get(contender.key)
        wanted = not args.table and any(part in contender.method for part in args.only or [""])
        if wanted and (row is None or any(part in contender.method for part in args.again)):
            try:
                measured = contender.measure()
            except RuntimeError as error:
                print(f"error: {contender.method}: {error}", file=sys.stderr, flush=True)
                continue
            row = {"benchmark": "frontier", "key": contender.key, "method": contender.method, "ours": contender.ours}
            row |= bench.settings | measured
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        if row is not None:
            rows.append(row | {"method": contender.method})
    return rows


def peers_of(given: list[str]) -> dict[str, str]:
    """Name → python, of the --peer flags."""
    peers = {}
    for peer in given:
        name, _, python = peer.partition("=")
        if name not in PEERS or not Path(python).exists():
            sys.exit(f"error: --peer {peer}: allowed names: {', '.join(PEERS)}; then = and the path of a Python")
        peers[name] = str(Path(python).absolute())
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default=None, help="text; without it the embedded one")
    parser.add_argument("--text", default=None, help="held-out text; without it the embedded one")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the held-out text")
    parser.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--recipe", action="append", default=[], help="a recipe file, or a shipped recipe's name")
    parser.add_argument("--peer", action="append", default=[], help="name=python of its virtual environment")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("build/frontier/results.jsonl"))
    parser.add_argument("--only", action="append", default=[], help="measure only methods with this in their name")
    parser.add_argument("--again", action="append", default=[], help="measure methods with this in their name again")
    parser.add_argument("--table", action="store_true", help="measure nothing: show what is known already")
    args = parser.parse_args()
    args.peers = peers_of(args.peer)
    for name in ("calibration", "text"):
        value = getattr(args, name)
        setattr(args, name, str(Path(value).absolute()) if value else None)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    rows = run_all(bench, args)
    rows.sort(key=lambda row: (row["width"], row["bits_per_weight"]))
    frontier_page.print_table(rows)
    page = args.results.parent / f"{bench.name}.html"
    page.write_text(frontier_page.page(rows, bench.name), encoding="utf-8")
    print(f"plot: {page}")


if __name__ == "__main__":
    main()
