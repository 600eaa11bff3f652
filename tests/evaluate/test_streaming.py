"""Block by block equals the whole model at once; sizes equal the files; gates close."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

import fettle
from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import Windows, evaluation_windows, read_text
from fettle.errors import NonFiniteError, QualityGateError, UsageError
from fettle.evaluate import streaming
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.result import Evaluation, check_gate
from fettle.evaluate.streaming import evaluate
from fettle.models.source import resolve
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
        evaluate(tiny_llama, resolve("demo"), windows)


def test_peak_memory_sees_an_allocation():
    restart_peak()
    before = peak_memory_bytes()
    held = torch.ones(16_000_000)
    assert peak_memory_bytes() - before > 50_000_000
    assert held.sum() > 0


def copy_of(folder, target, change=None):
    """The folder again, its tensors passed through `change`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_activations_that_are_not_finite_name_their_block(tiny_llama, windows, tmp_path):
    def overflow(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e38)
        tensors["model.layers.1.mlp.down_proj.weight"].fill_(1e38)

    broken = copy_of(tiny_llama, tmp_path / "broken", overflow)
    with pytest.raises(NonFiniteError, match=r"block 1 \(model\.layers\.1\).*window 0"):
        evaluate(broken, None, windows)
    with pytest.raises(NonFiniteError, match="block 1"):
        evaluate(tiny_llama, broken, windows, threads=2)


def test_logits_that_are_not_finite_name_the_head(tiny_llama, windows, tmp_path):
    broken = copy_of(tiny_llama, tmp_path / "broken", lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    with pytest.raises(NonFiniteError, match="the head"):
        evaluate(broken, None, windows)


def test_logits_in_parts_measure_the_same(tiny_llama, compressed, windows, monkeypatch):
    whole = evaluate(compressed, tiny_llama, windows)
    monkeypatch.setattr(streaming, "HEAD_LOGITS", 320 * 7)  # seven tokens at a time: 47 targets leave a rest of five
    parts = evaluate(compressed, tiny_llama, windows)
    assert parts.tokens == whole.tokens
    for name in ("perplexity", "kl_mean", "kl_max", "probability_rms_change"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4)
    assert parts.worst_tokens[0]["token"] == whole.worst_tokens[0]["token"]


def test_a_reference_with_another_vocabulary_is_refused(tiny_llama, windows, tmp_path):
    def cut(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:319].clone()

    smaller = copy_of(tiny_llama, tmp_path / "smaller", cut)
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 319}))
    with pytest.raises(UsageError, match="vocabulary of 320 and the reference one of 319"):
        evaluate(tiny_llama, smaller, windows)

    other = copy_of(tiny_llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="other vocabularies of the same size"):
        evaluate(tiny_llama, other, windows)


def test_no_windows_is_said_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="no windows"):
        evaluate(tmp_path / "no such folder", None, Windows((), 0, "t", "", ""))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of two blocks, and a copy whose last matrix is rounded to bfloat16."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder") / "bert"
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=96, max_position_embeddings=64, **shape)).save_pretrained(folder)
    name = "encoder.layer.1.output.dense.weight"
    return folder, copy_of(folder, folder.parent / "rounded", lambda t: t.update({name: t[name].bfloat16().float()}))


def test_an_encoder_is_measured_by_its_outputs(encoder):
    base, rounded = encoder
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(1, 96, (count,), generator=generator) for count in (16, 16, 9))
    found = evaluate(rounded, base, Windows(ids, 41, "made", "0" * 64, ""))
    assert (found.perplexity, found.kl_mean, found.top1_agreement, found.bits_per_byte) == (None,) * 4
    assert found.tokens == 41

    from transformers import BertModel

    models = [BertModel.from_pretrained(folder).eval() for folder in (rounded, base)]
    with torch.no_grad():
        ours, theirs = (torch.cat([m(i[None]).last_hidden_state[0] for i in ids]).double() for m in models)
    expected = ((ours - theirs).norm() / theirs.norm()).item()
    assert 0 < expected < 0.01
    assert found.output_relative_error == pytest.approx(expected, rel=1e-2)
    assert found.error_by_block[0] == 0
    assert found.error_by_block[1] == found.output_relative_error
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean().item()
    assert found.output_cosine == pytest.approx(cosine, abs=1e-6)
    with pytest.raises(UsageError, match="language model"):
        check_gate(found, 1.0)
