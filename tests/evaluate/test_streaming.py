"""Block by block equals the whole model at once; sizes equal the files; gates close."""

from __future__ import annotations

import json
import math

import pytest
import torch

import fettle
from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import evaluation_windows, read_text
from fettle.errors import QualityGateError, UsageError
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.result import Evaluation, check_gate
from fettle.evaluate.streaming import evaluate
from fettle.pipeline.recipe import parse_recipe


@pytest.fixture(scope="module")
def compressed(tiny_llama, tmp_path_factory):
    recipe = parse_recipe({"steps": [{"method": "round_to_nearest", "bits": 3, "group_size": 32}]}, "t")
    return fettle.compress(tiny_llama, tmp_path_factory.mktemp("c") / "out", recipe, evaluate=False).folder


@pytest.fixture(scope="module")
def windows(tiny_llama, text_file):
    return evaluation_windows(load_tokenizer(tiny_llama), read_text(text_file), length=48, max_tokens=400)


def test_streaming_equals_whole_models(tiny_llama, compressed, windows):
    found = evaluate(compressed, tiny_llama, windows, threads=2)
    model, reference = (fettle.load(folder).model for folder in (compressed, tiny_llama))
    kl, loss, agree = [], [], []
    with torch.no_grad():
        for ids in windows.ids:
            q, p = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (model, reference))
            kl.append((p.exp() * (p - q)).sum(-1))
            loss.append(-q.gather(1, ids[1:, None])[:, 0])
            agree.append(q.argmax(-1) == p.argmax(-1))
    kl, loss, agree = torch.cat(kl), torch.cat(loss), torch.cat(agree)
    assert found.tokens == len(kl)
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    assert found.perplexity == pytest.approx(math.exp(loss.mean().item()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(agree.double().mean().item())
    assert found.bits_per_byte == pytest.approx(loss.sum().item() / math.log(2) / windows.text_bytes, rel=1e-5)
    assert len(found.error_by_block) == 2
    assert 0 < found.error_by_block[0] < 1


def test_a_model_against_itself(tiny_llama, windows):
    found = evaluate(tiny_llama, tiny_llama, windows)
    assert (found.kl_mean, found.kl_max, found.top1_agreement) == (0, 0, 1)
    assert found.error_by_block == [0, 0]
    assert found.perplexity == found.reference_perplexity
    assert found.bits_per_weight is None
    assert found.model_bits_per_weight == 16


def test_threads_do_not_change_the_result(tiny_llama, compressed, windows):
    one, two = (evaluate(compressed, tiny_llama, windows, threads=t).to_json() for t in (1, 2))
    for unstable in ("seconds", "peak_memory_bytes"):
        assert one.pop(unstable) >= 0 and two.pop(unstable) >= 0
    assert one == two


def test_bytes_and_bits_count_everything_in_the_files(tiny_llama, compressed, windows):
    found = evaluate(compressed, None, windows)
    assert found.bytes == sum(p.stat().st_size for p in compressed.glob("*.safetensors"))
    from safetensors import safe_open

    codes, weights, everything = 0, 0, 0
    for path in compressed.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 — not a mapping
                tensor = file.get_tensor(name)
                everything += tensor.nbytes
                if ".weight_" in name:
                    codes += tensor.nbytes
                    weights += math.prod(tensor.tolist()) if name.endswith("weight_shape") else 0
    assert found.bits_per_weight == 8 * codes / weights
    assert found.model_bits_per_weight == 8 * everything / found.parameters
    assert found.parameters == sum(p.numel() for p in fettle.load(tiny_llama).model.parameters())
    assert found.kl_mean is None


def test_json_survives_and_other_schemas_are_refused(tiny_llama, windows):
    found = evaluate(tiny_llama, tiny_llama, windows)
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert {r.name for r in found.results()} >= {"perplexity", "kl_mean", "bytes"}
    assert all(r.measured and r.how for r in found.results())
    with pytest.raises(UsageError, match="schema 99"):
        Evaluation.from_json(found.to_json() | {"schema": 99})
    content = found.to_json()
    del content["tokens"]
    with pytest.raises(UsageError, match="not whole"):
        Evaluation.from_json(content)


def test_the_gate(tiny_llama, compressed, windows):
    found = evaluate(compressed, tiny_llama, windows)
    check_gate(found, found.kl_mean)
    with pytest.raises(QualityGateError, match="above the allowed"):
        check_gate(found, found.kl_mean * 0.99)
    with pytest.raises(UsageError, match="needs --reference"):
        check_gate(evaluate(compressed, None, windows), 1.0)


def test_another_models_reference_is_refused(tiny_llama, windows):
    with pytest.raises(UsageError, match="made from"):
        evaluate(tiny_llama, fettle.api.resolve("demo"), windows)


def test_peak_memory_sees_an_allocation():
    restart_peak()
    before = peak_memory_bytes()
    held = torch.ones(16_000_000)
    assert peak_memory_bytes() - before > 50_000_000
    assert held.sum() > 0
