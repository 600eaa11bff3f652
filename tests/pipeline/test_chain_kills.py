"""A chain that is killed at any of its durable writes goes on where it was: the same bytes, the same losses."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

import fettle
from fettle.pipeline.chain import Chain, parse_chain
from tests.apart import Ended, run_apart, signal_at_sync

HOW = {
    "steps": 3, "windows": 8, "length": 32, "batch_windows": 4, "look_every": 2, "checkpoint_every": 1, "held_back": 2,
}  # fmt: skip


def chain(text: Path) -> Chain:
    codes = {"steps": [{"method": "round_to_nearest", "bits": 2, "group_size": 16}]}
    trained: dict[str, Any] = {**HOW, "text": str(text), "learning_rate": 1e-3}
    stages = [{"train": "distill", "teacher_top_k": 4, **trained}, {"compress": codes}, {"train": "qat", **trained}]
    return parse_chain({"name": "three", "stages": stages}, "test")


def train_until(model: Path, out: Path, text: Path, at: int) -> None:
    """Runs the chain, unless the durable write `at` comes first and with it SIGKILL; prints how many there were."""
    writes = signal_at_sync(at, signal.SIGKILL)
    fettle.train(model, out, chain(text), evaluate=False, threads=1)
    print(writes())


def run_until(model: Path, out: Path, text: Path, at: int) -> Ended:
    out.parent.mkdir(exist_ok=True)
    return run_apart(train_until, model, out, text, at, folder=out.parent)


def told(out: Path) -> dict[str, Any]:
    """The digests of what was written, and every stage's losses."""
    stages = json.loads((out.parent / f"{out.name}.run" / "training.json").read_text())["stages"]
    curves = [stage["curve"] for stage in stages if stage.get("curve")]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir()) if p.is_file()}
    return {**digests, "losses": [(curve["losses"], curve["held_back"]) for curve in curves]}


@pytest.fixture(scope="module")
def undisturbed(
    tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], int]:
    """What a chain that nobody kills leaves, and how many durable writes it makes."""
    out = tmp_path_factory.mktemp("whole") / "model"
    run = run_until(tiny_llama, out, text_file, -1)
    assert run.code == 0, run.said
    found = told(out)
    assert len(found["losses"]) == 2
    return found, int(run.said.split()[-1])


def check(model: Path, text: Path, folder: Path, at: int, expected: dict[str, Any]) -> None:
    out = folder / f"killed-{at}" / "model"
    run = run_until(model, out, text, at)
    assert run.code == -signal.SIGKILL, run.said
    fettle.train(model, out, chain(text), evaluate=False, threads=1)
    assert told(out) == expected


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_killed_chain_goes_on_to_the_same_bytes_and_losses(
    share: float, tiny_llama: Path, text_file: Path, tmp_path: Path, undisturbed: tuple[dict[str, Any], int]
) -> None:
    """In the middle of the first training, and of the second, behind a compression."""
    expected, writes = undisturbed
    check(tiny_llama, text_file, tmp_path, round(share * writes), expected)


@pytest.mark.exhaustive
def test_a_chain_killed_at_every_durable_write(
    tiny_llama: Path, text_file: Path, tmp_path: Path, undisturbed: tuple[dict[str, Any], int]
) -> None:
    expected, writes = undisturbed
    for at in range(1, writes + 1):
        check(tiny_llama, text_file, tmp_path, at, expected)
