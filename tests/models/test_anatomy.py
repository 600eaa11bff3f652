"""Anatomies off config and headers alone: prefixes, missing and misshapen tensors, unknown families, --generic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fettle.errors import CheckpointError, UnknownFamilyError
from fettle.models.anatomy import dimensions, evaluate_shape, read_anatomy
from fettle.models.checkpoint import SINGLE, Checkpoint
from fettle.models.families import FAMILIES, find_family
from fettle.models.loading import load
from fettle.models.skeleton import Skeleton

from ..parity.tiny_models import random_ids, reference_output, write_model

IDS = random_ids(12, seed=4)


def change_tensors(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = change(load_file(folder / SINGLE))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SINGLE)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not None}
    path.write_text(json.dumps(config))


def test_no_transformers_is_needed(llama: Path) -> None:
    script = (
        "import sys\nfrom fettle.models.anatomy import read_anatomy\nfrom fettle.models.checkpoint import Checkpoint\n"
        "assert len(list(read_anatomy(Checkpoint.open(sys.argv[1])).linears())) == 21\n"
        "assert not {'transformers', 'accelerate', 'compressed_tensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(llama)], check=True)


def test_roles_groups_and_shapes_of_a_llama(llama: Path) -> None:
    anatomy = read_anatomy(Checkpoint.open(llama))
    linears = {linear.role: linear for linear in anatomy.blocks[1].linears}
    assert list(linears) == ["query", "key", "value", "output", "gate", "up", "down"]
    assert [linear.shape for linear in linears.values()] == [
        (32, 32), (16, 32), (16, 32), (32, 32), (44, 32), (44, 32), (32, 44)
    ]  # fmt: skip
    assert linears["query"].input_group == linears["value"].input_group == "model.layers.1.self_attn.qkv"
    assert linears["gate"].input_group == linears["up"].input_group
    assert len({linear.input_group for linear in linears.values()}) == 4
    assert linears["key"].name == "model.layers.1.self_attn.k_proj" and linears["key"].block == 1
    assert anatomy.head is not None and not anatomy.tied and anatomy.find("lm_head") is anatomy.head
    with pytest.raises(KeyError):
        anatomy.find("model.layers.1")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "bert-masked-lm", "gpt_neox", "llama"])
def test_a_checkpoint_without_the_prefix_is_the_same_model(tmp_path: Path, name: str) -> None:
    model = write_model(name, tmp_path)
    prefix = find_family(model.config.model_type).prefix
    change_tensors(tmp_path, lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})
    checkpoint = Checkpoint.open(tmp_path)
    assert not any(n.startswith(prefix) for n in checkpoint.entries)
    assert torch.equal(reference_output(load(tmp_path).model, IDS), reference_output(model, IDS))


def test_a_base_model_may_carry_the_prefix(tmp_path: Path) -> None:
    model = write_model("bert", tmp_path)
    change_tensors(tmp_path, lambda tensors: {f"bert.{n}": t for n, t in tensors.items()})
    assert torch.equal(reference_output(load(tmp_path).model, IDS), reference_output(model, IDS))


def test_old_bert_names_of_norms_are_understood(tmp_path: Path) -> None:
    model = write_model("bert", tmp_path)

    def rename(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    change_tensors(tmp_path, lambda tensors: {rename(n): t for n, t in tensors.items()})
    assert torch.equal(reference_output(load(tmp_path).model, IDS), reference_output(model, IDS))


def test_masks_that_old_checkpoints_carry_do_no_harm(tmp_path: Path) -> None:
    model = write_model("gpt2", tmp_path)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    change_tensors(tmp_path, lambda tensors: tensors | masks)
    assert torch.equal(reference_output(load(tmp_path).model, IDS), reference_output(model, IDS))


@pytest.mark.parametrize("duplicate", [True, False])
def test_a_head_beside_a_tied_config_is_its_own_matrix(tmp_path: Path, duplicate: bool) -> None:
    write_model("llama-tied-biased", tmp_path)
    embedding = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    own = embedding.clone() if duplicate else embedding + 1
    change_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": own})
    loaded = load(tmp_path)
    assert torch.equal(loaded.model.lm_head.weight, own)
    assert torch.equal(loaded.model.model.embed_tokens.weight, embedding)


def test_missing_and_misshapen_tensors_are_named_together(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 31)
        return tensors

    change_tensors(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        read_anatomy(Checkpoint.open(folder))
    message = str(caught.value)
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in message
    assert "'model.norm.weight' is missing" in message
    assert "'model.layers.0.self_attn.q_proj.weight' has shape [32, 31], expected [32, 32]" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, r"blocks \[2\] exist"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\.self_attn\.q_proj\.weight' is missing"),
        ({"num_hidden_layers": 10**9}, r"says there are 1000000000 blocks, and the files hold 3"),
        ({"attention_bias": True}, r"model\.layers\.0\.self_attn\.q_proj\.bias' is missing"),
        ({"mlp_bias": True}, r"model\.layers\.0\.mlp\.down_proj\.bias' is missing"),
        ({"vocab_size": 95}, r"embed_tokens.*\[96, 32\], expected \[95, 32\]"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "big"}, "must be a whole number"),
        ({"num_attention_heads": 0}, "at least 1"),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_a_config_of_another_model_is_refused(
    llama: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)
    change_config(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_anatomy(Checkpoint.open(folder))


def test_an_unknown_family_names_the_next_step(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(llama, folder)
    change_config(folder, model_type="lama")
    with pytest.raises(UnknownFamilyError, match=r"'lama'.*did you mean 'llama'.*families\.py.*--generic"):
        read_anatomy(Checkpoint.open(folder))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_neo"])
def test_generic_finds_the_same_matrices_and_runs_them(tmp_path: Path, name: str) -> None:
    model = write_model(name, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    known, generic = read_anatomy(checkpoint), read_anatomy(checkpoint, generic=True)
    assert {x.name: x.shape for x in generic.linears()} == {x.name: x.shape for x in known.linears()}
    assert {x.role for x in generic.linears()} == {"linear"}
    assert generic.tensors == known.tensors
    assert generic.embedding is not None and known.embedding is not None
    assert generic.embedding.weight_name == known.embedding.weight_name
    skeleton = Skeleton.build(checkpoint, generic)
    hidden = skeleton.embed(IDS[None])
    for block in generic.blocks:
        skeleton.load_block(block.index)
        hidden = skeleton.run_block(block.index, hidden)
        skeleton.free_block(block.index)
    assert torch.equal(skeleton.logits(hidden), reference_output(model, IDS))


def test_generic_leaves_routers_out(tmp_path: Path) -> None:
    write_model("qwen3_moe", tmp_path)
    names = {x.name for x in read_anatomy(Checkpoint.open(tmp_path), generic=True).linears()}
    assert "model.layers.0.mlp.gate" not in names
    assert "model.layers.0.mlp.experts.0.gate_proj" in names


@pytest.mark.parametrize(("name", "key"), [("mixtral", "num_local_experts"), ("llama", "num_hidden_layers")])
def test_a_number_that_the_files_cannot_hold_is_told_at_once(tmp_path: Path, name: str, key: str) -> None:
    write_model(name, tmp_path)
    change_config(tmp_path, **{key: 10**9})
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing|1000000000"):
        read_anatomy(checkpoint)
    if key == "num_hidden_layers":
        with pytest.raises(CheckpointError, match="num_hidden_layers = 1000000000"):
            read_anatomy(checkpoint, generic=True)


@pytest.mark.parametrize(
    ("name", "bias"), [("gpt2", "h.0.attn.c_attn.bias"), ("gpt_neox", "layers.1.attention.dense.bias")]
)
def test_a_bias_that_the_architecture_always_has_is_missed(tmp_path: Path, name: str, bias: str) -> None:
    write_model(name, tmp_path)
    change_tensors(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(bias)})
    with pytest.raises(CheckpointError, match=rf"{bias}' is missing"):
        read_anatomy(Checkpoint.open(tmp_path))


def test_generic_needs_numbered_blocks(plain: Path) -> None:
    with pytest.raises(CheckpointError, match="numbered list"):
        read_anatomy(Checkpoint.open(plain), generic=True)


def test_tables_are_consistent() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "num_experts": 3}
    for family in FAMILIES:
        dims = dimensions(config | {"moe_intermediate_size": 5}, family)
        for row in family.rows:
            assert all(evaluate_shape(part, dims) > 0 for part in row.shape), row
        assert len({row.name for row in family.rows}) == len(family.rows)
