"""Every shipped chain is short, parses, survives its own round trip, and runs whole on a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import fettle
from fettle.models.loading import load
from fettle.pipeline.chain import Chain, Stage, load_chain, parse_chain, shipped_chains
from fettle.pipeline.recipe import CalibrationOptions

from .test_shipped import briefly_tuned

CHAINS = shipped_chains()


def test_the_promised_chains_are_there() -> None:
    promised = {
        "qat-2bit",
        "ternary",
        "shallow-4bit",
        "qlora-4bit",
        "heal-4bit",
        "assistant",
        "distill-narrow-4bit",
        "prune-heal-4bit",
        "prune-lora-4bit",
    }
    assert {path.stem for path in CHAINS} >= promised


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_a_chain_is_short_and_equals_what_it_writes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25
    assert text.startswith("# ")
    found = load_chain(path.stem)
    assert found.name == path.stem
    assert parse_chain(found.to_dict(), path.stem) == found


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_a_chain_runs_on_a_tiny_model(path: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    if "adapter" in path.read_text():
        pytest.importorskip("peft")
    made = fettle.train(tiny_llama, tmp_path / "out", small(load_chain(path), text_file), evaluate=False)
    assert any((tmp_path / "out" / name).is_file() for name in ("fettle.json", "adapter_config.json"))
    assert made.report_path.is_file()


def small(chain: Chain, text: Path) -> Chain:
    """The same stages, for a model of two blocks and a second."""
    calibration = CalibrationOptions(windows=8, length=32, text=str(text))
    stages = []
    for stage in chain.stages:
        if stage.recipe is not None:
            stages.append(Stage(recipe=dataclasses.replace(briefly_tuned(stage.recipe), calibration=calibration)))
            continue
        method: Any = stage.method
        fewer: dict[str, Any] = {"steps": 2, "windows": 8, "length": 32, "batch_windows": 4, "text": str(text)}
        if getattr(method, "layers", None):
            fewer["layers"] = 1
        stages.append(Stage(method=dataclasses.replace(method, **fewer)))
    return Chain(name=chain.name, stages=tuple(stages))


@pytest.mark.parametrize("name", ["prune-heal-4bit", "prune-lora-4bit"])
def test_a_pruned_models_mask_outlives_healing_and_codes(
    name: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """What a chain leaves of half the weights is what its first stage left, though values moved twice."""
    if "lora" in name:
        pytest.importorskip("peft")
    fettle.train(tiny_llama, tmp_path / "out", small(load_chain(name), text_file), evaluate=False)
    stages = tmp_path / "out.run" / "stages"
    folders = (stages / "01-compress", next(p for p in stages.glob("02-*") if p.is_dir() and p.suffix != ".run"))
    pruned, healed, coded = (load(folder, dense=True).model.state_dict() for folder in (*folders, tmp_path / "out"))
    for key, first in pruned.items():
        if key.endswith("proj.weight"):
            zeros = first == 0
            assert 0.49 < float(zeros.float().mean()) < 0.51, key
            assert torch.equal(healed[key] == 0, zeros), key
            assert not torch.equal(healed[key], first), key
            assert bool((coded[key][zeros] == 0).all()), key
