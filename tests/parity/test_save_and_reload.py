"""Saved and reloaded: nothing compressed gives identical logits, 8 bits close ones; standard folders load plainly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fettle.errors import CheckpointError
from fettle.layers import QuantizedLinear
from fettle.models.anatomy import Anatomy, Linear, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.skeleton import Skeleton
from fettle.models.storage import stored_schemes
from fettle.tensors.scheme import Granularity, Scheme

from .compressed import make_scheme, write_compressed
from .conftest import Written
from .tiny_models import TINY, random_ids, reference_output

NAMES = sorted(TINY)
IDS = random_ids(23, seed=11)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_compressed_gives_identical_logits(written: Written, tmp_path: Path, name: str) -> None:
    folder, model = written(name)
    write_compressed(folder, tmp_path, lambda linear, anatomy: None)
    loaded = load(tmp_path)
    assert torch.equal(reference_output(loaded.model, IDS), reference_output(model, IDS))
    assert loaded.tokenizer is None


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_give_close_logits_and_blocks_agree_with_the_whole(
    written: Written, tmp_path: Path, name: str
) -> None:
    folder, model = written(name)
    scheme = make_scheme(8)
    codes = write_compressed(
        folder, tmp_path, lambda linear, _: None if linear.block is None or linear.role == "router" else scheme
    )
    loaded = load(tmp_path)
    reference, output = reference_output(model, IDS), reference_output(loaded.model, IDS)
    assert not torch.equal(output, reference)
    # The median, not the largest: a token whose two experts are nearly equal may go to the other one.
    assert (output - reference).abs().median() < 0.04 * reference.abs().median()

    checkpoint = Checkpoint.open(tmp_path)
    anatomy = read_anatomy(checkpoint)
    assert {n: s.scheme for n, s in stored_schemes(checkpoint, anatomy).items()} == dict.fromkeys(codes, scheme)
    skeleton = Skeleton.build(checkpoint, anatomy)
    hidden = skeleton.embed(IDS[None])
    for block in anatomy.blocks:
        skeleton.load_block(block.index)
        for linear in block.linears:
            assert linear.name not in codes or torch.equal(skeleton.weight(linear), codes[linear.name].dequantize())
        hidden = skeleton.run_block(block.index, hidden)
        skeleton.free_block(block.index)
    torch.testing.assert_close(skeleton.output(hidden), output, rtol=1e-4, atol=1e-4)


def plain_transformers(folder: Path, class_name: str) -> torch.nn.Module:
    import transformers

    model: torch.nn.Module = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


STANDARD: dict[str, tuple[str, Scheme, str]] = {
    "int4 groups": ("llama", make_scheme(4, "group", 4), "pack-quantized"),
    "int4 groups, zero point": ("llama", make_scheme(4, "group", 4, zero_point=True), "pack-quantized"),
    "int4 groups, bfloat16": ("llama", make_scheme(4, "group", 4, scale_dtype="bfloat16"), "pack-quantized"),
    "int4 groups, float16, zero point": (
        "llama",
        make_scheme(4, "group", 4, scale_dtype="float16", zero_point=True),
        "pack-quantized",
    ),
    "int8 as int8, bfloat16": ("llama", make_scheme(8, scale_dtype="bfloat16"), "int-quantized"),
    "int3 channel": ("llama-tied-biased", make_scheme(3), "pack-quantized"),
    "int3 groups, zero point": ("qwen3", make_scheme(3, "group", 4, zero_point=True), "pack-quantized"),
    "int2 groups, zero point": ("gemma2", make_scheme(2, "group", 4, zero_point=True), "pack-quantized"),
    "int5 channel": ("mistral", make_scheme(5), "pack-quantized"),
    "int7 channel, zero point": ("qwen2", make_scheme(7, zero_point=True), "pack-quantized"),
    "int8 channel, fused": ("phi3", make_scheme(8), "pack-quantized"),
    "int8 tensor": ("llama", make_scheme(8, "tensor"), "pack-quantized"),
    "int4 tensor, zero point": ("llama", make_scheme(4, "tensor", zero_point=True), "pack-quantized"),
    "int8 as int8": ("llama", make_scheme(8), "int-quantized"),
    "int8 as int8, zero point": ("llama", make_scheme(8, zero_point=True), "int-quantized"),
    "int8 as int8, groups": ("llama", make_scheme(8, "group", 4), "int-quantized"),
    "int8 as int8, tensor": ("llama", make_scheme(8, "tensor"), "int-quantized"),
    "neox": ("gpt_neox", make_scheme(4, "group", 4), "pack-quantized"),
    "neo": ("gpt_neo", make_scheme(4, "group", 4), "pack-quantized"),
    "bert": ("bert", make_scheme(4, "group", 4), "pack-quantized"),
    "masked bert": ("bert-masked-lm", make_scheme(8), "pack-quantized"),
}


@pytest.mark.parametrize("case", sorted(STANDARD))
def test_the_standards_folder_loads_with_plain_transformers(written: Written, tmp_path: Path, case: str) -> None:
    name, scheme, storage = STANDARD[case]
    folder, _ = written(name)
    choose = lambda linear, anatomy: scheme if linear.block is not None else None  # noqa: E731
    write_compressed(folder, tmp_path, choose, storage=storage)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert "sparsity_config" not in config
    ours = load(tmp_path)
    assert any(isinstance(m, QuantizedLinear) for m in ours.model.modules())
    plain = plain_transformers(tmp_path, TINY[name][0])
    torch.testing.assert_close(reference_output(plain, IDS), reference_output(ours.model, IDS), rtol=1e-5, atol=2e-6)


def test_head_and_mixed_schemes_load_with_plain_transformers(written: Written, tmp_path: Path) -> None:
    folder, _ = written("llama")
    by_role = {"down": make_scheme(8), "head": make_scheme(6, "group", 16), "value": None}

    def choose(linear: Linear, anatomy: Anatomy) -> Scheme | None:
        if linear.role == "embedding":
            return None
        return by_role.get(linear.role, make_scheme(4, "group", 8))

    write_compressed(folder, tmp_path, choose)
    checkpoint = Checkpoint.open(tmp_path)
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    for linear in (*anatomy.linears(), anatomy.head):
        assert linear is not None
        found = stored.get(linear.name)
        assert (found.scheme if found else None) == choose(linear, anatomy)
    plain = plain_transformers(tmp_path, "AutoModelForCausalLM")
    torch.testing.assert_close(
        reference_output(plain, IDS), reference_output(load(tmp_path).model, IDS), rtol=1e-5, atol=2e-6
    )


def whole_group(linear: Linear, anatomy: Anatomy) -> Scheme | None:
    return make_scheme(8, "group", 7) if linear.block is not None else None


def everything(linear: Linear, anatomy: Anatomy) -> Scheme | None:
    return (
        make_scheme(8) if linear.role != "router" else None
    )  # a router's choice between two equals flips with any error


def mixed_with_zero_points(linear: Linear, anatomy: Anatomy) -> Scheme | None:
    return make_scheme(8 if linear.role == "down" else 7, "group", 4, zero_point=True)


@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("llama", whole_group),
        ("llama", mixed_with_zero_points),
        ("gpt2", everything),
        ("mixtral", everything),
        ("llama-tied-biased", everything),
    ],
)
def test_what_the_standard_cannot_say_is_ours_and_plain_transformers_refuses_it(
    written: Written, tmp_path: Path, name: str, choose
) -> None:  # type: ignore[no-untyped-def]
    folder, model = written(name)
    codes = write_compressed(folder, tmp_path, choose)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fettle"
    loaded = load(tmp_path)
    reference, output = reference_output(model, IDS), reference_output(loaded.model, IDS)
    assert 0 < (output - reference).abs().mean() < 0.05 * reference.abs().mean()
    checkpoint = Checkpoint.open(tmp_path)
    assert set(codes) <= set(stored_schemes(checkpoint, read_anatomy(checkpoint)))
    for class_name in ("AutoModelForCausalLM", TINY[name][0]):
        with pytest.raises(Exception, match=r"written by fettle.*fettle\.load"):
            plain_transformers(tmp_path, class_name)


def test_a_third_partys_patterns_are_understood(written: Written, tmp_path: Path) -> None:
    folder, _ = written("llama")
    attention, rest = make_scheme(4, "group", 8), make_scheme(8)

    def choose(linear: Linear, anatomy: Anatomy) -> Scheme | None:
        if linear.block is None:
            return None
        return attention if "self_attn" in linear.name else rest

    write_compressed(folder, tmp_path, choose)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [4, 8]
    groups["group_0"]["targets"] = [r"re:.*self_attn\.(q|k|v|o)_proj$"]
    groups["group_1"]["targets"] = ["Linear"]
    groups["group_0"].pop("format")
    path.write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    anatomy = read_anatomy(checkpoint)
    stored = stored_schemes(checkpoint, anatomy)
    assert all(stored[linear.name].scheme == choose(linear, anatomy) for linear in anatomy.linears())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "float"}, "float"),
        ({"strategy": "block"}, "strategy block"),
        ({"num_bits": 1}, "1-bit"),
    ],
)
def test_a_quantization_that_fettle_cannot_read_is_refused(
    written: Written, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder, _ = written("llama")
    write_compressed(folder, tmp_path, lambda linear, _: make_scheme(4) if linear.block is not None else None)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_another_programs_method_is_refused(written: Written, tmp_path: Path) -> None:
    folder, _ = written("llama")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="awq"):
        load(tmp_path)


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_generate_works_on_a_compressed_model(written: Written, tmp_path: Path, granularity: Granularity) -> None:
    folder, _ = written("llama")
    scheme = make_scheme(4, granularity, 8 if granularity == "group" else None)
    write_compressed(folder, tmp_path, lambda linear, _: scheme if linear.block is not None else None)
    model = load(tmp_path).model
    output = model.generate(IDS[None], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = IDS
    for _ in range(5):  # the same, one whole pass a token
        ids = torch.cat([ids, reference_output(model, ids)[0, -1].argmax()[None]])
    assert torch.equal(output[0], ids)
