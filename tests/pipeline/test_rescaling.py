"""A compression that rescales: what it writes, what it leaves alone, what the drift becomes, kills and threads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fettle
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.pipeline import rescaling, walk
from fettle.pipeline.recipe import Recipe, parse_recipe
from fettle.pipeline.run import prepare
from fettle.pipeline.stream import Stream

from .conftest import digests, make_recipe

AWQ = {"method": "awq", "bits": 3, "clip": "none"}


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def ledger(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["linear"]: line for line in json.loads((folder / "fettle.json").read_text())["ledger"]}


@pytest.fixture(scope="module")
def uneven_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with some channels driven harder than others, as in trained models, and columns that fit that."""
    folder = tmp_path_factory.mktemp("uneven") / "llama"
    shutil.copytree(tiny_llama, folder)
    checkpoint = Checkpoint.open(tiny_llama)
    held = tensors(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    for block in read_anatomy(checkpoint).blocks:
        for feed in block.feeds:
            if feed.linear is None:
                strength = torch.randn(64, generator=generator).exp()
                held[feed.weight_name] = (held[feed.weight_name].float() * strength).bfloat16()
                for linear in (x for x in block.linears if x.input_group == feed.input_group):
                    held[linear.weight_name] = (held[linear.weight_name].float() / strength).bfloat16()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def steps(text: Path, *steps: dict[str, Any]) -> Recipe:
    calibration = {"windows": 6, "length": 32, "seed": 0, "text": str(text)}
    return parse_recipe({"name": "several", "steps": list(steps), "calibration": calibration}, "test")


def test_norms_are_written_and_the_model_is_no_worse(uneven_llama: Path, text_file: Path, tmp_path: Path) -> None:
    found = {}
    for alphas in (0, 20):
        out = tmp_path / str(alphas)
        fettle.compress(uneven_llama, out, make_recipe(text_file, **AWQ, alphas=alphas), evaluate=False)
        found[alphas] = fettle.evaluate(out, reference=uneven_llama, text=text_file, length=32).kl_mean
    base, plain, ours = tensors(uneven_llama), tensors(tmp_path / "0"), tensors(tmp_path / "20")
    norms = [name for name in base if name.endswith("layernorm.weight")]
    assert len(norms) == 4
    for name in norms:
        assert torch.equal(plain[name], base[name])
        assert not torch.equal(ours[name], base[name])
        assert ours[name].dtype == base[name].dtype
    assert torch.equal(ours["model.norm.weight"], base["model.norm.weight"])
    assert found[0] is not None and found[20] is not None and found[20] < 0.9 * found[0]
    notes = [line["note"] for line in ledger(tmp_path / "20").values()]
    assert len(notes) == 14 and all(note.startswith("inputs rescaled by ") for note in notes)
    nearest = tmp_path / "nearest"
    fettle.compress(uneven_llama, nearest, make_recipe(text_file, method="round_to_nearest", bits=3), evaluate=False)
    assert all(torch.equal(value, plain[name]) for name, value in tensors(nearest).items()), "alpha 0 rescales nothing"


@pytest.mark.parametrize("step", [{**AWQ, "solver": "gptq"}, {"method": "smoothquant", "bits": 8}], ids=str)
def test_threads_and_a_kill_change_no_byte(
    tiny_llama: Path, text_file: Path, tmp_path: Path, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(text_file, **step)
    for threads in (1, 2):
        fettle.compress(tiny_llama, tmp_path / f"{threads}" / "out", recipe, threads=threads, evaluate=False)
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
        fettle.compress(tiny_llama, out, recipe, evaluate=False)
    monkeypatch.undo()
    fettle.compress(tiny_llama, out, recipe, evaluate=False)
    assert digests(out) == expected


def test_what_cannot_be_rescaled_is_left_alone_with_a_reason(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    where = {"role": ["query", "key", "output", "gate", "up", "down"]}
    four = {**AWQ, "bits": 4, "where": {"role": ["up"]}}
    fettle.compress(tiny_llama, tmp_path / "out", steps(text_file, {**AWQ, "where": where}, four), evaluate=False)
    base, ours = tensors(tiny_llama), tensors(tmp_path / "out")
    assert all(torch.equal(ours[name], base[name]) for name in base if name.endswith("layernorm.weight"))
    notes = {name.rpartition(".")[2]: line["note"] for name, line in ledger(tmp_path / "out").items()}
    assert (
        notes["q_proj"]
        == notes["gate_proj"]
        == ("inputs not rescaled: linears that read the same are not compressed alike")
    )
    assert notes["o_proj"].endswith("v_proj.weight feeds it and is not compressed")
    assert notes["down_proj"].startswith("inputs rescaled by ")


def test_a_model_without_a_table_is_left_alone_with_a_reason(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    fettle.compress(tiny_llama, tmp_path / "out", make_recipe(text_file, **AWQ), generic=True, evaluate=False)
    base, ours = tensors(tiny_llama), tensors(tmp_path / "out")
    assert all(torch.equal(ours[name], base[name]) for name in base if name.endswith("norm.weight"))
    notes = {line["note"] for line in ledger(tmp_path / "out").values()}
    assert notes == {"inputs not rescaled: nothing is known to feed it that could be divided"}


def test_the_drift_is_in_the_units_of_the_rescaled_inputs(
    tiny_llama: Path, text_file: Path, tiny_anatomy: Anatomy
) -> None:
    """Inputs X/s against the original's X°/s: D becomes D/(s·sᵀ); nothing else may move it."""
    run = prepare(tiny_llama, make_recipe(text_file, **AWQ, solver="gptq"), threads=1)
    found = []
    for rescaled in (False, True):
        with run.workers, torch.no_grad():
            stream = Stream(run.job, None)
            stream.hidden = [state * 1.01 + 0.01 for state in stream.hidden]
            stream.load_block(0)
            if rescaled:
                rescaling.rescale_block(run.job, run.layout.units[0], stream)
            factors = dict(stream.factors)
            kinds = ("gram", "drift")
            seen = stream.collect(0, [(linear, kinds) for linear in tiny_anatomy.blocks[0].linears])
            stream.leave_original(0)
            stream.free_block(0)
            assert not stream.factors
            found.append({group: (one.statistics, factors.get(group)) for group, one in seen.items()})
    assert len(found[1]) == 4
    for group, (statistics, s) in found[1].items():
        assert s is not None
        for kind, value in statistics.items():
            expected = found[0][group][0][kind] / (s.unsqueeze(1) * s)
            difference = float((value - expected).abs().max()) / float(expected.abs().max())
            assert difference < 1e-3, (group, kind)
