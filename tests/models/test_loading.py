"""Loading a whole model: tokenizer, generation settings, damage, what is stored as codes stays so."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fettle.data.tokenizer import load_tokenizer
from fettle.errors import CheckpointError, ModelError, NonFiniteError
from fettle.layers import QuantizedLinear
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import SINGLE, Checkpoint
from fettle.models.loading import load
from fettle.models.skeleton import Skeleton
from fettle.models.storage import module_name

from ..parity.compressed import make_scheme, write_compressed
from ..parity.tiny_models import random_ids, reference_output


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_model_comes_with_its_tokenizer_and_generation_settings(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    assert loaded.folder == tiny_llama and loaded.anatomy.family == "llama"
    ids = loaded.tokenizer("def fox", return_tensors="pt")["input_ids"]
    made = loaded.model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.shape[1] == ids.shape[1] + 3
    assert loaded.model.generation_config.bos_token_id == 0
    assert next(loaded.model.parameters()).dtype == torch.float32


def test_another_dtype_can_be_asked_for(llama: Path) -> None:
    assert {p.dtype for p in load(llama, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


def test_what_is_stored_as_codes_stays_codes(llama: Path, tmp_path: Path) -> None:
    codes = write_compressed(llama, tmp_path, lambda x, _: make_scheme(4, "group", 8) if x.block == 1 else None)
    loaded = load(tmp_path)
    modules = dict(loaded.model.named_modules())
    for linear in loaded.anatomy.linears():
        module = modules[module_name(linear)]
        assert isinstance(module, QuantizedLinear) == (linear.block == 1)
        if linear.name in codes:
            assert torch.equal(module.quantized.codes, codes[linear.name].codes)


def test_a_flipped_bit_is_found_by_the_recorded_hash(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    hashes = {n: hashlib.sha256(checkpoint.read(n).numpy().tobytes()).hexdigest() for n in checkpoint.entries}
    (copy / "fettle.json").write_text(json.dumps({"tensors": hashes}))
    load(copy)
    name = "model.layers.2.mlp.up_proj.weight"
    data = bytearray((copy / SINGLE).read_bytes())
    data[checkpoint.entries[name].start + 11] ^= 4
    (copy / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(copy)
    load(copy, verify=False)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_nan_in_a_weight_is_named(copy: Path, name: str) -> None:
    tensors = load_file(copy / SINGLE)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, copy / SINGLE)
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        load(copy)


def test_a_nan_in_a_scale_is_named(llama: Path, tmp_path: Path) -> None:
    write_compressed(llama, tmp_path, lambda x, _: make_scheme(4, "group", 8) if x.block == 1 else None)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.1.self_attn.o_proj.weight_scale"][0, 0] = float("inf")
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(NonFiniteError, match=r"o_proj\.weight_scale.*block 1"):
        load(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    skeleton = Skeleton.build(checkpoint, read_anatomy(checkpoint))
    skeleton.load_block(0)
    with pytest.raises(NonFiniteError, match=r"o_proj\.weight_scale.*block 1"):
        skeleton.load_block(1)


@pytest.mark.parametrize("lost", ["weight_scale", "weight_packed", "weight_zero_point"])
def test_codes_that_lack_a_part_are_named(llama: Path, tmp_path: Path, lost: str) -> None:
    scheme = make_scheme(4, "group", 8, zero_point=True)
    write_compressed(llama, tmp_path, lambda x, _: scheme if x.block == 1 else None)
    tensors = load_file(tmp_path / SINGLE)
    del tensors[f"model.layers.1.mlp.up_proj.{lost}"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)


def test_a_bias_that_is_missing_is_named(tmp_path: Path, tiny_qwen: Path) -> None:
    shutil.copytree(tiny_qwen, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / SINGLE)
    del tensors["model.layers.0.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj\.bias' is missing"):
        load(tmp_path)


@pytest.mark.parametrize("generic", [False, True])
def test_a_bias_that_the_config_promises_is_missed_beside_codes_too(llama: Path, tmp_path: Path, generic: bool) -> None:
    write_compressed(llama, tmp_path, lambda x, _: make_scheme(4, "group", 4) if x.block is not None else None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(CheckpointError, match=r"self_attn\.[qk]_proj\.bias' is missing"):
        load(tmp_path, generic=generic)


def test_a_nan_in_a_bias_beside_codes_is_named(tmp_path: Path, tiny_qwen: Path) -> None:
    write_compressed(tiny_qwen, tmp_path, lambda x, _: make_scheme(4, "group", 4) if x.block == 1 else None)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.1.self_attn.k_proj.bias"][2] = float("nan")
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(NonFiniteError, match=r"k_proj\.bias.*block 1"):
        load(tmp_path)


@pytest.mark.parametrize("ends", ["x", [1, "x"], 5.5, {"a": 1}])
def test_generation_settings_that_cannot_be_are_named(copy: Path, ends: object) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged: eos_token_id"):
        load(copy)


def test_a_padding_token_outside_the_vocabulary_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"pad_token_id": 999_999}))
    with pytest.raises(ModelError, match=r"config\.json.*[Pp]adding_idx must be within"):
        load(copy)


@pytest.mark.parametrize("fields", [{"head_dim": 7.5}, {"rope_scaling": {"type": "nosuch"}}, {"hidden_act": "nosuch"}])
def test_what_transformers_cannot_build_is_a_bad_model(copy: Path, fields: dict[str, object]) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ModelError, match=r"config\.json"):
        load(copy)


def test_a_tokenizer_that_may_not_be_read_is_not_called_damaged(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refused(*_: object, **__: object) -> None:
        raise OSError("Can't load tokenizer")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refused)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for read in (load, load_tokenizer):
        with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read \(Permission denied\)"):
            read(tiny_llama)


def test_an_architecture_that_transformers_lacks_says_so(copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "nosuch", "architectures": ["NoSuchForCausalLM"]}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot build the model.*nosuch"):
        load(copy, generic=True)


def test_a_damaged_tokenizer_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{broken")
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="tokenizer in"):
        load(copy)


def test_loading_repeats_what_the_folder_says(llama: Path, copy: Path) -> None:
    ids = random_ids(9, seed=6)
    assert torch.equal(reference_output(load(llama).model, ids), reference_output(load(copy).model, ids))
