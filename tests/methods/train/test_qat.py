"""Quantization-aware training: what was trained with is what the written file decodes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fettle
from fettle.errors import RecipeError
from fettle.kernels import native
from fettle.methods.train import Qat
from fettle.methods.train.curve import Curve
from fettle.methods.train.fake_quantization import FakeQuantizedLinear
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.storage import read_quantized, stored_schemes
from fettle.pipeline.recipe import parse_recipe

from ...parity.tiny_models import write_model

Trained = Callable[..., tuple[Path, Curve]]
IDS = torch.arange(2, 22).unsqueeze(0)
FORMS: dict[str, dict[str, Any]] = {
    "2 bits, zero points": {"bits": 2, "asymmetric": True},
    "inputs of 8 bits": {"bits": 4, "activations": "dynamic", "activation_bits": 8},
    "inputs with a stored scale": {
        "bits": 8,
        "group_size": None,
        "activations": "static",
        "activation_asymmetric": True,
    },
    "ternary in BitNet's way": {
        "grid": "ternary",
        "granularity": "tensor",
        "group_size": None,
        "activations": "dynamic",
    },
    "binary": {"grid": "binary"},
}


@pytest.fixture(scope="session")
def tiny_qwen(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of one block, whose query, key and value have biases, with the tiny Llama's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen"
    AutoTokenizer.from_pretrained(str(tiny_llama)).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The last values that fake-quantized linears computed with, and what the model gave at the end."""
    found: dict[str, Tensor] = {}
    export = FakeQuantizedLinear.quantized

    def remember(layer: FakeQuantizedLinear) -> Any:
        found[str(len(found))] = layer.values().detach().clone()
        return export(layer)

    monkeypatch.setattr(FakeQuantizedLinear, "quantized", remember)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_written_file_decodes_to_what_was_trained_with(
    form: str, tiny_llama: Path, trained: Trained, used: dict[str, Tensor]
) -> None:
    output, curve = trained(Qat, tiny_llama, **FORMS[form], learning_rate=2e-3, keep="last", steps=3)
    assert len(curve.losses) == 3
    checkpoint = Checkpoint.open(output)
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    linears = list(anatomy.linears())
    assert len(used) == len(linears) == len(stored)
    for linear, values in zip(linears, used.values(), strict=True):
        assert torch.equal(read_quantized(checkpoint, linear, stored[linear.name]).dequantize(), values), linear.name
    assert torch.isfinite(load(output).model(IDS).logits).all()


@pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")
@pytest.mark.parametrize("form", FORMS)
def test_the_native_engine_runs_what_was_trained(form: str, tiny_qwen: Path, trained: Trained) -> None:
    """The loaded model's logits, a family with biases; inputs on the border of two codes may fall on the other side."""
    from tests.parity.test_native import open_runner, pages_for, run_all

    output, _ = trained(Qat, tiny_qwen, **FORMS[form], learning_rate=5e-3, keep="last", steps=2, hard=1.0, soft=0.0)
    with torch.no_grad():
        expected = load(output).model(IDS).logits[0]
    found = torch.from_numpy(run_all(open_runner(output), IDS[0].tolist(), pages_for(IDS.shape[1], 4)))
    if "activations" in FORMS[form]:
        assert float((found - expected).norm() / expected.norm()) < 0.02
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_learns_is_what_is_named(tiny_qwen: Path, trained: Trained) -> None:
    """codes: no norm and no bias; blocks: those of the blocks; all: embedding and last norm as well; scales by rate."""
    how: dict[str, Any] = {"bits": 4, "group_size": 16, "learning_rate": 5e-2, "steps": 2, "keep": "last", "hard": 1.0}
    base = Checkpoint.open(tiny_qwen)

    def moved(**fields: Any) -> set[str]:
        output, _ = trained(Qat, tiny_qwen, **how, **fields)
        made = Checkpoint.open(output)
        kept = {name for name in base.entries if name in made.entries and torch.equal(base.read(name), made.read(name))}
        return base.entries.keys() & made.entries.keys() - kept

    inside = {"input_layernorm.weight", "post_attention_layernorm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert moved(trains="codes") == set()
    blocks = moved(trains="blocks")
    assert {".".join(name.split(".")[-2:]) for name in blocks} == inside
    outside = {"model.embed_tokens.weight", "model.norm.weight"}
    assert moved(trains="all") == blocks | outside


def test_scales_learn_at_their_own_rate(tiny_llama: Path, trained: Trained) -> None:
    """scale_rate 0: the scales that no step moved; 1: others. Codes learn in both."""
    how: dict[str, Any] = {"bits": 4, "group_size": 16, "steps": 2, "keep": "last"}
    found = [
        Checkpoint.open(trained(Qat, tiny_llama, **how, learning_rate=rate, scale_rate=scale_rate)[0])
        for rate, scale_rate in ((0.0, 1.0), (1e-2, 0.0), (1e-2, 1.0))
    ]

    def same(ending: str, one: int, two: int) -> set[bool]:
        names = [name for name in found[0].entries if name.endswith(ending)]
        return {torch.equal(found[one].read(name), found[two].read(name)) for name in names}

    assert same("weight_scale", 0, 1) == {True}
    assert same("weight_scale", 0, 2) == {False}
    assert same("weight_packed", 0, 1) == same("weight_packed", 0, 2) == {False}


def test_training_at_two_bits_wins_back_what_rounding_lost(tiny_llama: Path, trained: Trained) -> None:
    _, curve = trained(Qat, tiny_llama, bits=2, steps=20, look_every=10, learning_rate=1e-2, windows=32)
    assert curve.best is not None
    assert curve.best[1] < 0.85 * curve.held_back[0][1]


def test_codes_that_were_chosen_before_are_gone_on_from(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    """No step: the same codes, scales and zero points come out; steps: the scheme stays and the codes move."""
    base = tmp_path / "codes"
    method = {"method": "round_to_nearest", "bits": 3, "group_size": 16, "asymmetric": True}
    from fettle.pipeline.recipe import parse_recipe

    fettle.compress(tiny_llama, base, parse_recipe({"name": "codes", "steps": [method]}, "test"), evaluate=False)
    still, _ = trained(Qat, base, tiny_llama, learning_rate=0.0, steps=1)
    moved, _ = trained(Qat, base, tiny_llama, learning_rate=5e-3, steps=3, keep="last")
    before, same, after = (Checkpoint.open(folder) for folder in (base, still, moved))
    codes = [name for name in before.entries if name.endswith("weight_packed")]
    assert codes
    assert before.entries.keys() == same.entries.keys() == after.entries.keys()
    assert all(torch.equal(before.read(name), same.read(name)) for name in before.entries)
    assert any(not torch.equal(before.read(name), after.read(name)) for name in codes)
    schemes = [stored_schemes(c, read_anatomy(c)) for c in (before, after)]
    assert schemes[0] == schemes[1]


def test_stored_input_scales_learn_on_from_the_codes(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    """No step: the scales of the inputs come out as they were; steps: they move, and the file computes with them."""
    base = tmp_path / "codes"
    fettle.compress(tiny_llama, base, "w8a8-static", evaluate=False)
    still, _ = trained(Qat, base, tiny_llama, learning_rate=0.0, steps=1)
    moved, _ = trained(Qat, base, tiny_llama, learning_rate=1e-2, steps=3, keep="last")
    before, same, after = (Checkpoint.open(folder) for folder in (base, still, moved))
    scales = [name for name in before.entries if name.endswith("input_scale")]
    assert scales
    assert before.entries.keys() == same.entries.keys() == after.entries.keys()
    assert all(torch.equal(before.read(name), same.read(name)) for name in before.entries)
    assert all(not torch.equal(before.read(name), after.read(name)) for name in scales)


def test_a_scheme_beside_that_of_the_codes_is_refused(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    fettle.compress(tiny_llama, tmp_path / "codes", "round-to-nearest-4bit", evaluate=False)
    with pytest.raises(RecipeError, match="whose scheme is kept; leave out bits"):
        trained(Qat, tmp_path / "codes", tiny_llama, bits=2)
    for rule in ("mean", "learned"):
        with pytest.raises(RecipeError, match="whose scheme is kept; leave out scale_rule"):
            trained(Qat, tmp_path / "codes", tiny_llama, scale_rule=rule)
    with pytest.raises(RecipeError, match="leave out bits, scale_rule"):
        trained(Qat, tmp_path / "codes", tiny_llama, bits=2, scale_rule="mean")


def test_a_family_without_linears_of_their_own_is_refused(tmp_path: Path, tiny_llama: Path, trained: Trained) -> None:
    write_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(RecipeError, match=r"is no nn\.Linear of its own"):
        trained(Qat, tmp_path / "gpt2", bits=4)


def test_plain_transformers_reads_what_was_trained(tiny_llama: Path, trained: Trained) -> None:
    """Groups that divide the rows: the standard's own format."""
    from transformers import AutoModelForCausalLM

    output, _ = trained(Qat, tiny_llama, bits=4, group_size=4, steps=1)
    ours = load(output).model
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-4)


def test_coded_embedding_and_head_stay_the_codes_that_they_were(
    tiny_llama: Path, tmp_path: Path, trained: Trained
) -> None:
    """Nothing of them learns: their tensors pass through as they lie in the base, and the folder stays small."""
    base = tmp_path / "base"
    steps = [
        {"method": "round_to_nearest", "bits": 2, "group_size": 32},
        {"method": "round_to_nearest", "bits": 8, "group_size": 32, "where": {"role": ["embedding", "head"]}},
    ]
    fettle.compress(tiny_llama, base, parse_recipe({"name": "coded", "steps": steps}, "test"), evaluate=False)
    with pytest.raises(
        RecipeError, match=r"has codes in .*embed_tokens and lm_head, .* allowed: trains: codes, blocks"
    ):
        trained(Qat, base, tiny_llama, trains="all")
    output, _ = trained(Qat, base, tiny_llama, keep="last", learning_rate=2e-2)
    before, after = Checkpoint.open(base), Checkpoint.open(output)
    assert after.entries.keys() == before.entries.keys()
    outside = [name for name in before.entries if "layers." not in name]
    assert any("embed_tokens.weight_" in name for name in outside)
    assert any("lm_head.weight_" in name for name in outside)
    for name in outside:
        assert torch.equal(after.read(name), before.read(name))
    assert any(not torch.equal(after.read(name), before.read(name)) for name in before.entries if "layers." in name)
    assert torch.isfinite(load(output).model(IDS).logits).all()
