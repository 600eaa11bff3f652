"""Adapters beside dense and packed bases: the base untouched, PEFT's own format, merging, several on one base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fettle
from fettle.data.windows import calibration_windows
from fettle.errors import CheckpointError, RecipeError, UsageError
from fettle.layers import QuantizedLinear
from fettle.methods.train import Adapter, Distill
from fettle.methods.train.adapters import PackedBase, adaptable_, load_adapters, merge_adapter, wrapped
from fettle.methods.train.curve import Curve
from fettle.methods.train.job import TrainJob
from fettle.methods.train.named_teachers import load_teacher, teacher_hashes
from fettle.methods.train.options import LoopFields
from fettle.methods.train.text_mix import learning_part
from fettle.methods.train.training import train
from fettle.models.loading import load

from .conftest import SMALL

peft = pytest.importorskip("peft")

Trained = Callable[..., tuple[Path, Curve]]
IDS = torch.arange(2, 22).unsqueeze(0)
HOW = {"steps": 3, "learning_rate": 2e-2, "keep": "last"}
METHODS = {
    2: {"method": "round_to_nearest", "bits": 2, "group_size": 16, "asymmetric": True},
    3: {"method": "round_to_nearest", "grid": "normal_float", "bits": 3},
    4: {"method": "round_to_nearest", "bits": 4, "group_size": 32},
}


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The tiny model in 2, 3 and 4 bits."""
    from fettle.pipeline.recipe import parse_recipe

    folder = tmp_path_factory.mktemp("packed")
    for bits, method in METHODS.items():
        recipe = parse_recipe({"name": "packed", "steps": [method]}, "test")
        fettle.compress(tiny_llama, folder / str(bits), recipe, evaluate=False)
    return {bits: folder / str(bits) for bits in METHODS}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


OTHERS = [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("rslora", "ia3", "prefix")]


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", *OTHERS])
def test_every_kind_learns_beside_codes_and_is_read_by_peft(
    kind: str, packed: dict[int, Path], tiny_llama: Path, trained: Trained
) -> None:
    before = digests(packed[4])
    output, curve = trained(Adapter, packed[4], tiny_llama, kind=kind, **HOW, rank=2)
    assert digests(packed[4]) == before
    assert {p.name for p in output.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert curve.held_back[-1][1] != curve.held_back[0][1]
    record = json.loads((output / "fettle_adapter.json").read_text())
    assert record["bytes"] == (output / "adapter_model.safetensors").stat().st_size
    loaded = load(packed[4])
    plain = logits(loaded.model)
    adapted = load_adapters(loaded, {"mine": output})
    found = logits(adapted)[:, -IDS.shape[1] :]
    assert not torch.allclose(found, plain, atol=1e-5)
    assert str(tiny_llama) not in (output / "adapter_config.json").read_text()


def test_targets_are_groups_or_roles(tiny_llama: Path, trained: Trained) -> None:
    """Only the linears of the roles that are named get matrices; a word that is no role is refused."""
    output, _ = trained(Adapter, tiny_llama, **HOW, rank=1, targets="value, mlp")
    told = json.loads((output / "adapter_config.json").read_text())["target_modules"]
    assert {name.rpartition(".")[2] for name in told} == {"v_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(RecipeError, match="names 'values'; allowed: all, attention, mlp, query"):
        Adapter(targets="values").validate()


def test_a_learner_leaves_the_callers_chance_alone(tiny_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    job = TrainJob(model=tiny_llama, original=tiny_llama, output=tmp_path / "out", folder=tmp_path / "run")
    first, second = (Adapter(rank=2).learner(job).model for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_prefix_and_blocks_that_run_again_are_refused() -> None:
    with pytest.raises(RecipeError, match="set gradient_checkpointing: false, or use lora"):
        Adapter(kind="prefix", gradient_checkpointing=True).validate()
    Adapter(kind="prompt", gradient_checkpointing=True).validate()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codes_stay_packed_while_gradients_pass(bits: int, packed: dict[int, Path]) -> None:
    loaded = load(packed[bits])
    stored = {name: t.clone() for name, t in loaded.model.named_buffers()}
    adaptable_(loaded.model)
    model = wrapped(loaded.model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    assert any(isinstance(m, PackedBase) for m in model.modules())
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())
    model(input_ids=IDS, labels=IDS).loss.backward()
    first = [p for n, p in model.named_parameters() if "layers.0" in n and "q_proj.lora_B" in n]
    assert float(first[0].grad.abs().sum()) > 0  # through every packed linear above it
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)
    after = {name.replace(".packed", "").replace(".base_layer", ""): t for name, t in model.named_buffers()}
    for name, tensor in stored.items():
        assert torch.equal(after[f"base_model.model.{name}"], tensor)


def test_gradients_beside_codes_are_those_beside_their_dense_values(packed: dict[int, Path]) -> None:
    found = []
    for dense in (False, True):
        loaded = load(packed[3], dense=dense)
        adaptable_(loaded.model)
        torch.manual_seed(0)
        model = wrapped(
            loaded.model, peft.LoraConfig(r=2, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
        )
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n.replace(".packed", ""): p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5), name


@pytest.fixture(scope="module")
def loras(
    packed: dict[int, Path], tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three trainings of LoRA beside 4 bits: two seeds, and one of them merged."""
    folder = tmp_path_factory.mktemp("loras")
    forms: dict[str, dict[str, Any]] = {"one": {}, "two": {"seed": 1}, "merged": {"merge": True}}
    for name, form in forms.items():
        method = Adapter(**{**SMALL, **HOW, **form}, text=str(text_file))
        job = TrainJob(model=packed[4], original=tiny_llama, output=folder / name, folder=folder / f"{name}.run")
        train(method, job)
    return {name: folder / name for name in forms}


def test_merged_is_base_and_adapter_as_one(packed: dict[int, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(load_adapters(load(packed[4]), {"mine": loras["one"]}))
    merge_adapter(packed[4], loras["one"], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert not any(isinstance(m, QuantizedLinear) for m in merged.model.modules())
    close = logits(merged.model)
    assert (close - expected).norm() < 0.02 * expected.norm()  # the files are bfloat16
    assert torch.equal(logits(load(loras["merged"]).model), close)


def test_a_merged_model_is_quantized_again_and_its_loss_measured(loras: dict[str, Path], tmp_path: Path) -> None:
    fettle.compress(loras["merged"], tmp_path / "again", "round-to-nearest-4bit", evaluate=False)
    found = fettle.evaluate(tmp_path / "again", reference=loras["merged"], length=64, max_tokens=512)
    assert found.kl_mean is not None
    assert found.kl_mean > 0


def test_several_adapters_on_one_base_are_chosen_at_call_time(packed: dict[int, Path], loras: dict[str, Path]) -> None:
    both = load_adapters(load(packed[4]), {name: loras[name] for name in ("one", "two")})
    found = {}
    for name in ("two", "one"):
        both.set_adapter(name)
        found[name] = logits(both)
        assert torch.equal(found[name], logits(load_adapters(load(packed[4]), {"only": loras[name]})))
    assert not torch.allclose(found["one"], found["two"], atol=1e-4)
    with both.disable_adapter():
        assert torch.allclose(logits(both), logits(load(packed[4]).model), atol=1e-6)


def test_a_residual_start_is_nearer_to_the_original_than_the_codes(
    packed: dict[int, Path], tiny_llama: Path, trained: Trained
) -> None:
    _, none = trained(Adapter, packed[2], tiny_llama, hard=0.0, soft=1.0, steps=1)
    _, near = trained(Adapter, packed[2], tiny_llama, hard=0.0, soft=1.0, steps=1, start="residual", rank=32)
    assert near.held_back[0][1] < 0.5 * none.held_back[0][1]
    with pytest.raises(RecipeError, match="needs the model that the base was compressed from"):
        trained(Adapter, packed[2], packed[2], start="residual")


def test_an_adapter_of_another_base_is_refused(packed: dict[int, Path], loras: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_adapters(load(packed[3]), {"mine": loras["one"]})
    with pytest.raises(CheckpointError, match="is no adapter"):
        load_adapters(load(packed[4]), {"mine": packed[4]})
    with pytest.raises(UsageError, match="no adapter is given"):
        load_adapters(load(packed[4]), {})


def test_an_adapter_on_a_dense_base_learns_as_well(tiny_llama: Path, trained: Trained) -> None:
    before = digests(tiny_llama)
    _, curve = trained(Adapter, tiny_llama, steps=12, learning_rate=2e-2, rank=8)
    assert curve.best is not None
    assert curve.best[1] < curve.held_back[0][1]
    assert digests(tiny_llama) == before


def test_eva_begins_along_the_inputs_and_as_the_base(
    packed: dict[int, Path], tiny_llama: Path, text_file: Path, trained: Trained
) -> None:
    """A spans the main directions of a linear's inputs, by a decomposition of the test's own; B is zero."""
    output, curve = trained(Adapter, packed[4], tiny_llama, start="eva", rank=4, **{**HOW, "learning_rate": 0.0})
    assert curve.held_back[0][1] == pytest.approx(curve.held_back[-1][1], abs=1e-6)
    stored = load_file(output / "adapter_model.safetensors")
    key = next(name for name in stored if "layers.0" in name and "q_proj.lora_A" in name)
    assert not stored[key.replace("lora_A", "lora_B")].any()
    loaded, seen = load(packed[4]), []
    path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    loaded.model.get_submodule(path).register_forward_hook(lambda _, read, __: seen.append(read[0][0]))
    part = learning_part(LoopFields(text=str(text_file)))
    for ids in calibration_windows(loaded.tokenizer, part, windows=32, length=SMALL["length"], seed=0).ids:
        with torch.no_grad():
            loaded.model(input_ids=ids.unsqueeze(0))
    inputs = torch.cat(seen)
    directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)[2][:4]
    ours = torch.linalg.qr(stored[key].float().T)[0].T
    assert torch.linalg.svdvals(directions @ ours.T)[:3].min() > 0.9  # incremental, and the last two are near


def test_an_adapted_model_teaches_its_base(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    """Adapter distillation: what the adapter learned is the teacher, so the two start apart and come nearer."""
    adapter, _ = trained(Adapter, tiny_llama, **{**HOW, "steps": 6}, rank=4)
    teacher = f"{tiny_llama}+{adapter}"
    _, curve = trained(Distill, tiny_llama, teacher=teacher, steps=8, learning_rate=3e-3)
    assert curve.held_back[0][1] > 1e-3
    assert min(loss for _, loss in curve.held_back) < 0.8 * curve.held_back[0][1]
    plain, adapted = teacher_hashes(str(tiny_llama)), teacher_hashes(teacher)
    assert adapted.items() > plain.items()
    with pytest.raises(CheckpointError, match="is no adapter"):
        load_teacher(f"{tiny_llama}+{tmp_path}", device="cpu", generic=False)
