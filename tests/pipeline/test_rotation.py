"""A compression on a rotated base: what it writes, kills and threads, what it is compared by, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fettle
from fettle.errors import CheckpointError, RecipeError
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.rotated import BASIS_KEY
from fettle.pipeline import walk
from fettle.pipeline.recipe import Recipe, parse_recipe
from fettle.pipeline.run import prepare
from fettle.search.budget import Budget

from .conftest import digests

ROTATION = {"method": "rotation", "seed": 3}
EIGHT = {"method": "round_to_nearest", "bits": 8, "group_size": None}


def steps(text: Path, *steps: dict[str, Any]) -> Recipe:
    calibration = {"windows": 6, "length": 32, "seed": 0, "text": str(text)}
    return parse_recipe({"name": "rotated", "steps": list(steps), "calibration": calibration}, "test")


@pytest.fixture(scope="module")
def tied_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with norms that are not one, a tied head, and one channel of the residual stream that stands out,
    as in large trained models.
    """
    folder = tmp_path_factory.mktemp("tied") / "llama"
    shutil.copytree(tiny_llama, folder)
    checkpoint = Checkpoint.open(tiny_llama)
    held = {name: checkpoint.read(name) for name in checkpoint.entries if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in held.items():
        if "norm" in name:
            held[name] = (tensor.float() + 0.2 * torch.randn(tensor.shape, generator=generator)).bfloat16()
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.embed_tokens.weight"][:, 5] *= 40
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def eight(tied_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, rotated, with 8 bits."""
    folder = tmp_path_factory.mktemp("eight") / "out"
    recipe = steps(text_file, ROTATION, EIGHT)
    predicted = fettle.plan(tied_llama, recipe).output_bytes
    made = fettle.compress(tied_llama, folder, recipe, evaluate=False)
    assert made.summary["output"]["bytes"] == predicted
    return folder


def test_what_is_written(tied_llama: Path, eight: Path) -> None:
    base, ours = Checkpoint.open(tied_llama), Checkpoint.open(eight)
    assert ours.config[BASIS_KEY] == {"method": "rotation", "residual": True, "heads": True, "seed": 3}
    assert ours.config["tie_word_embeddings"] is False and base.config["tie_word_embeddings"] is True
    assert not read_anatomy(ours).tied and "lm_head.weight" not in base.entries
    for name in base.entries:
        if "norm" in name:
            assert set(ours.read(name).tolist()) == {1.0}
    assert ours.entries["lm_head.weight"].dtype == torch.bfloat16
    steps = json.loads((eight / "fettle.json").read_text())["recipe"]["steps"]
    assert [step["method"] for step in steps] == ["rotation", "round_to_nearest"]
    assert "method: rotation" in (eight / "README.md").read_text()


def test_it_is_the_base_to_any_loader(tied_llama: Path, eight: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float32)(ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(eight, dtype=torch.float32)(ids).logits
        ours = fettle.load(eight).model(ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03
    torch.testing.assert_close(loaded, ours, atol=1e-4, rtol=1e-3)


def test_hidden_states_are_compared_in_the_coordinates_of_the_original(
    tied_llama: Path, eight: Path, text_file: Path, tmp_path: Path
) -> None:
    found = fettle.evaluate(eight, reference=tied_llama, text=text_file, length=32, max_tokens=512)
    assert found.error_by_block is not None and max(found.error_by_block) < 0.03
    assert found.output_cosine is not None and found.output_cosine > 0.999
    silent = tmp_path / "silent"
    shutil.copytree(eight, silent)
    config = json.loads((silent / "config.json").read_text())
    (silent / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != BASIS_KEY}))
    blind = fettle.evaluate(silent, reference=tied_llama, text=text_file, length=32, max_tokens=512)
    assert blind.kl_mean == found.kl_mean and min(blind.error_by_block or [0]) > 0.5, "the key is what tells"
    for damaged in ("x", {"method": "turn"}, {"method": "rotation", "seed": "x"}, {"method": []}):
        (silent / "config.json").write_text(json.dumps({**config, BASIS_KEY: damaged}))
        with pytest.raises(CheckpointError, match=f"its {BASIS_KEY} cannot be understood"):
            fettle.evaluate(silent, reference=tied_llama, text=text_file, length=32, max_tokens=512)


def test_outlier_channels_cost_less_on_a_rotated_model(tied_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """What rotation is for: 4-bit inputs whose scale one channel dictates."""
    inputs = {"method": "round_to_nearest", "bits": 8, "activations": "dynamic", "activation_bits": 4}
    found = {}
    for name, before in (("plain", []), ("rotated", [ROTATION])):
        recipe = steps(text_file, *before, inputs)
        fettle.compress(tied_llama, tmp_path / name, recipe, evaluate=False)
        measured = fettle.evaluate(tmp_path / name, reference=tied_llama, text=text_file, length=32, max_tokens=1024)
        found[name] = measured.kl_mean or 0.0
    assert 0 < found["rotated"] < 0.5 * found["plain"], found


@pytest.mark.parametrize(
    "step",
    [
        {"method": "gptq", "bits": 8, "correction": 0.5},
        pytest.param({"method": "learned_rounding", "bits": 8, "steps": 4}, marks=pytest.mark.exhaustive),
        pytest.param({"method": "awq", "bits": 8, "clip": "none"}, marks=pytest.mark.exhaustive),
    ],
    ids=["gptq", "learned_rounding", "awq"],
)
def test_threads_and_a_kill_change_no_byte(
    tied_llama: Path, text_file: Path, tmp_path: Path, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = steps(text_file, ROTATION, step)
    for threads in (1, 2):
        fettle.compress(tied_llama, tmp_path / f"{threads}" / "out", recipe, threads=threads, evaluate=False)
    expected = digests(tmp_path / "1" / "out")
    assert digests(tmp_path / "2" / "out") == expected
    real, calls = walk.rescale_block, 0

    def killed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(walk, "rescale_block", killed)
    out = tmp_path / "killed" / "out"
    with pytest.raises(KeyboardInterrupt):
        fettle.compress(tied_llama, out, recipe, evaluate=False)
    monkeypatch.undo()
    fettle.compress(tied_llama, out, recipe, evaluate=False)
    assert digests(out) == expected
    found = fettle.evaluate(out, reference=tied_llama, text=text_file, length=32, max_tokens=512)
    assert found.error_by_block is not None and max(found.error_by_block) < 0.05


def test_another_seed_is_another_run(tied_llama: Path, text_file: Path, tmp_path: Path) -> None:
    written = []
    for seed in (0, 1):
        run = prepare(tied_llama, steps(text_file, {**ROTATION, "seed": seed}, EIGHT))
        written.append((run.identity, run.checkpoint.read("model.embed_tokens.weight")))
    assert written[0][0] != written[1][0]
    assert not torch.equal(written[0][1], written[1][1])


def test_part_of_the_linears_is_compressed_and_all_are_rotated(
    tied_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = steps(text_file, ROTATION, {**EIGHT, "where": {"role": ["up", "head"]}})
    fettle.compress(tied_llama, tmp_path / "out", recipe, evaluate=False)
    ours = Checkpoint.open(tmp_path / "out")
    assert "lm_head.weight_packed" in ours.entries, "the head of its own can be compressed"
    assert "model.layers.0.mlp.down_proj.weight" in ours.entries
    found = fettle.evaluate(tmp_path / "out", reference=tied_llama, text=text_file, length=32, max_tokens=512)
    assert found.error_by_block is not None and max(found.error_by_block) < 0.03


def test_a_budget_is_kept_on_the_rotated_model(tied_llama: Path, text_file: Path, tmp_path: Path) -> None:
    budget = Budget(bits_per_weight=5.0, candidates=("round_to_nearest bits=4", "round_to_nearest bits=8"))
    made = fettle.compress(
        tied_llama, tmp_path / "out", steps(text_file, ROTATION, EIGHT), budget=budget, evaluate=False
    )
    assert made.summary["recipe"]["steps"][0]["method"] == "rotation"
    assert made.summary["budget"]["bits_per_weight"] <= 5.0
    assert BASIS_KEY in Checkpoint.open(tmp_path / "out").config


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([EIGHT, ROTATION], "step 2: rotation is for the whole model.*make it the first step"),
        ([ROTATION, ROTATION, EIGHT], "step 2: rotation is for the whole model"),
        ([{**ROTATION, "where": {"role": "up"}}, EIGHT], "leave out 'where' there"),
        ([ROTATION], "rotation alone makes nothing smaller"),
        ([{**ROTATION, "sed": 1}, EIGHT], "step 1: unknown field of the method rotation"),
        ([{**ROTATION, "residual": False, "heads": False}, EIGHT], "rotate nothing"),
        ([{**ROTATION, "seed": -1}, EIGHT], "seed=-1 cannot be"),
    ],
)
def test_recipes_that_cannot_be(text_file: Path, wrong: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        steps(text_file, *wrong)


def test_a_candidate_cannot_be_a_rotation(tied_llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"for the whole model and compresses no linear.*--rotate"):
        fettle.diagnose(tied_llama, candidates=["rotation", "gptq bits=4"])


def test_an_unknown_family_is_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is known of the residual stream"):
        fettle.compress(tiny_llama, tmp_path / "out", steps(text_file, ROTATION, EIGHT), generic=True)
