"""From scratch: random weights that learn to be ternary or binary, everything with them, and resume to the byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fettle
from fettle.errors import RecipeError
from fettle.methods.train import Distill, Qat
from fettle.methods.train import curve as curve_module
from fettle.methods.train.curve import Curve, checkpoints
from fettle.methods.train.fake_quantization import FakeQuantizedLinear
from fettle.methods.train.fresh import load_afresh
from fettle.methods.train.job import TrainJob
from fettle.methods.train.lineage import moved
from fettle.methods.train.training import train
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.storage import read_quantized, stored_schemes
from fettle.pipeline.recipe import parse_recipe

from ...parity.tiny_models import write_model

Trained = Callable[..., tuple[Path, Curve]]
FORMS: dict[str, dict[str, Any]] = {
    "ternary": {"grid": "ternary", "granularity": "tensor", "activations": "dynamic"},
    "binary": {"grid": "binary", "group_size": 16},
}
SCRATCH: dict[str, Any] = {
    "begin": "random",
    "hard": 1.0,
    "soft": 0.0,
    "learning_rate": 1e-2,
    "steps": 30,
    "windows": 64,
}


def test_the_weights_are_transformers_own_first_ones(tmp_path: Path) -> None:
    """Tied as they were, norms 1, biases 0; the same numbers as a model that transformers makes under the seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_model("qwen2", tmp_path, seed=5)
    found = load_afresh(tmp_path, 3, device="cpu", generic=False).model
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    spread = made.config.initializer_range
    own = load(tmp_path).model.state_dict()
    for name, value in found.state_dict().items():
        if value.dim() > 1:
            assert float(value.std()) == pytest.approx(spread, rel=0.15), name
            assert not torch.equal(value, own[name])
        else:
            assert torch.equal(value, made.state_dict()[name]), name  # norms 1, biases 0
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.model.layers[0].self_attn.q_proj.bias is not None


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_learned_from_random_weights(
    form: str, tiny_llama: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-back loss falls, everything moves, and the file decodes to what was trained with."""
    used = []
    export = FakeQuantizedLinear.quantized

    def remember(layer: FakeQuantizedLinear) -> Any:
        used.append(layer.values().detach().clone())
        return export(layer)

    monkeypatch.setattr(FakeQuantizedLinear, "quantized", remember)
    output, curve = trained(Qat, tiny_llama, **FORMS[form], **SCRATCH, look_every=10)
    start, best = curve.held_back[0][1], curve.best
    assert start > 5.7  # knows nothing: no better than every token as likely, the log of 320
    assert best is not None and best[1] < 0.6 * start
    checkpoint = Checkpoint.open(output)
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    for linear, values in zip(anatomy.linears(), used, strict=True):
        assert torch.equal(read_quantized(checkpoint, linear, stored[linear.name]).dequantize(), values)
    first = load_afresh(tiny_llama, 0, device="cpu", generic=False).model.state_dict()
    last = load(output).model.state_dict()
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
    ):
        assert not torch.equal(first[name].bfloat16().float(), last[name]), name
    assert moved(checkpoint) == "it was trained from random weights"


def test_a_seed_gives_the_weights(tiny_llama: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_afresh(tiny_llama, seed, device="cpu", generic=False).model.state_dict()
        return found

    state = torch.get_rng_state()
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if first[name].dim() > 1)


def test_a_run_that_ended_early_goes_on_to_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Qat(
        **FORMS["ternary"], begin="random", hard=1.0, soft=0.5, steps=4, windows=8, length=32, batch_windows=4,
        checkpoint_every=2, look_every=2, held_back=2, keep="last", learning_rate=1e-2, text=str(text_file),
    )  # fmt: skip

    def into(name: str) -> TrainJob:
        return TrainJob(model=tiny_llama, original=tiny_llama, output=tmp_path / name, folder=tmp_path / f"{name}.run")

    whole = train(method, into("whole"))
    write_json = curve_module.write_json

    def stop(path: Path, content: Any) -> None:
        if path.parent.name == "checkpoint-4":
            raise KeyboardInterrupt
        write_json(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(curve_module, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            train(method, into("ended"))
    assert [path.name for path in checkpoints(tmp_path / "ended.run")] == ["checkpoint-2"]
    assert train(method, into("ended")).losses == whole.losses
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).iterdir())}
        for name in ("whole", "ended")
    ]
    assert digests[0] == digests[1]


def test_a_smaller_student_from_scratch(tiny_llama: Path, trained: Trained) -> None:
    """Distillation into random weights of a shape of one block; the next stage knows that the weights are others."""
    output, curve = trained(Distill, tiny_llama, layers=1, **SCRATCH | {"soft": 0.1, "steps": 10}, look_every=5)
    assert curve.best is not None and curve.best[1] < 0.8 * curve.held_back[0][1]
    coded = output.with_name("coded")
    steps = [{"method": "round_to_nearest", "bits": 4}]
    fettle.compress(output, coded, parse_recipe({"name": "coded", "steps": steps}, "test"), evaluate=False)
    for folder in (output, coded):
        assert (Checkpoint.open(folder).record or {})["begun_afresh"] is True
    on, _ = trained(Qat, coded, tiny_llama, steps=1)
    assert (Checkpoint.open(on).record or {})["begun_afresh"] is True


def test_what_cannot_begin_afresh_is_refused(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="trains=blocks would leave random weights"):
        trained(Qat, tiny_llama, begin="random", trains="blocks")
    with pytest.raises(RecipeError, match="without keep_zeros"):
        trained(Distill, tiny_llama, begin="random", keep_zeros=True)
    fettle.compress(tiny_llama, tmp_path / "codes", "round-to-nearest-4bit", evaluate=False)
    with pytest.raises(RecipeError, match="begin: random would throw them away"):
        trained(Qat, tmp_path / "codes", tiny_llama, begin="random")
