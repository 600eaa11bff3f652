"""What every candidate costs in every linear, on calibration text: block by block, kept on the disk as it goes.

    OUT.run/search/block-00000.safetensors    the codes of every linear in every candidate
                   block-00000.json           their KL estimates; written after the codes, so its presence says: whole

A killed scan goes on at the first block that has no estimates; the calibration then only passes through those before.
The codes serve the measurement of a mix: any choice of candidates can be put into the blocks and run, without solving
anything again. They take about as many bytes as all candidates together, and go once the mix is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from fettle.data.windows import Windows
from fettle.diagnose.candidates import Candidate
from fettle.diagnose.estimates import second_order
from fettle.diagnose.original import Original
from fettle.diagnose.scan import ScannedLinear, linears_of, scan
from fettle.models.writer import write_json, write_shard
from fettle.progress import Progress
from fettle.tensors.weights import weight_from_state

STORAGE = "pack-quantized"  # how the kept codes lie on the disk


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The estimates of every linear, and the model to measure mixes in."""

    folder: Path
    original: Original
    candidates: tuple[Candidate, ...]
    sensitivities: dict[str, dict[str, float]]

    def measure(self, mix: Mapping[str, str]) -> float:
        """KL to the original, nats a token of the sample, with these candidates in their linears at once."""
        original = self.original
        states = original.states[0]
        for index in range(original.block_count):
            original.load(index)
            chosen = [linear for linear in linears_of(original, index) if linear.name in mix]
            weights = [original.skeleton.weight(linear) for linear in chosen]
            with safe_open(self.folder / f"{_name(index)}.safetensors", framework="pt") as file:
                keys = set(file.keys())
                for linear in chosen:
                    candidate = next(c for c in self.candidates if c.label == mix[linear.name])
                    stem = f"{linear.name}|{candidate.label}|"
                    state = {key.removeprefix(stem): file.get_tensor(key) for key in keys if key.startswith(stem)}
                    quantized = weight_from_state(state, candidate.scheme, STORAGE)
                    original.skeleton.set_weight_(linear, quantized.dequantize())
            states = original.run(index, states)
            for linear, weight in zip(chosen, weights, strict=True):
                original.skeleton.set_weight_(linear, weight)
            original.free(index)
        return original.kl([states])[0]


def scan_sensitivities(
    original: Original,
    calibration: Windows | None,
    candidates: Sequence[Candidate],
    folder: Path,
    progress: Progress,
) -> Scan:
    """Scans the blocks that `folder` does not have yet, and reads the others from it."""
    known = {index: found for index in range(original.block_count) if (found := _read(folder, index)) is not None}
    with progress.task("finding sensitivities", original.block_count) as task:
        task.advance(len(known))
        for index, linears in scan(original, calibration, candidates, skip=tuple(known)):
            known[index] = _keep(original, index, linears, candidates, folder)
            task.advance()
    return Scan(
        folder=folder,
        original=original,
        candidates=tuple(candidates),
        sensitivities={name: kl for index in sorted(known) for name, kl in known[index].items()},
    )


def drop_codes(folder: Path) -> None:
    """Removes the kept codes; the estimates stay."""
    for path in folder.glob("block-*.safetensors"):
        path.unlink()


def scanned_blocks(folder: Path) -> int:
    """How many blocks have their estimates."""
    return len(list(folder.glob("block-*.json")))


def _keep(
    original: Original, index: int, linears: Sequence[ScannedLinear], candidates: Sequence[Candidate], folder: Path
) -> dict[str, dict[str, float]]:
    def estimate(piece: tuple[ScannedLinear, Candidate]) -> float:
        found, candidate = piece
        return second_order(found.quantized[candidate.label].dequantize() - found.weight, found.seen)[0]

    pieces = [(found, candidate) for found in linears for candidate in candidates]
    table: dict[str, dict[str, float]] = {found.linear.name: {} for found in linears}
    for (found, candidate), value in zip(pieces, original.workers.map(estimate, pieces), strict=True):
        table[found.linear.name][candidate.label] = value
    codes = {
        f"{found.linear.name}|{label}|{local}": tensor
        for found in linears
        for label, quantized in found.quantized.items()
        for local, tensor in quantized.to_state(STORAGE).items()
    }
    write_shard(folder, f"{_name(index)}.safetensors", codes)
    write_json(folder / f"{_name(index)}.json", table)
    return table


def _read(folder: Path, index: int) -> dict[str, dict[str, float]] | None:
    path = folder / f"{_name(index)}.json"
    if not (path.is_file() and path.with_suffix(".safetensors").is_file()):
        return None
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _name(index: int) -> str:
    return f"block-{index:05d}"
