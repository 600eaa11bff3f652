"""The skeleton's refusals, and that it reads no more than it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fettle.errors import CheckpointError, NonFiniteError, UsageError
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import SINGLE, Checkpoint
from fettle.models.skeleton import Skeleton

from ..parity.compressed import make_scheme, write_compressed
from ..parity.tiny_models import random_ids, write_model


def build(folder: Path) -> Skeleton:
    checkpoint = Checkpoint.open(folder)
    return Skeleton.build(checkpoint, read_anatomy(checkpoint))


def test_a_token_of_another_tokenizer_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match="token id 96 is outside the embedding of 96 rows"):
        build(llama).embed(torch.tensor([[3, 96]]))


def test_a_length_that_was_never_embedded_is_refused(llama: Path) -> None:
    skeleton = build(llama)
    hidden = skeleton.embed(random_ids(8)[None])
    skeleton.load_block(0)
    with pytest.raises(UsageError, match="no window of 5 tokens"):
        skeleton.run_block(0, hidden[:, :5])


def test_a_block_that_is_not_loaded_has_no_weights(llama: Path) -> None:
    skeleton = build(llama)
    with pytest.raises(UsageError, match=r"block 1 is not loaded.*q_proj"):
        skeleton.weight(skeleton.anatomy.blocks[1].linears[0])


def test_an_encoder_has_an_output_but_no_logits(tmp_path: Path) -> None:
    write_model("bert", tmp_path)
    skeleton = build(tmp_path)
    hidden = skeleton.embed(random_ids(6)[None])
    assert skeleton.output(hidden).shape == hidden.shape
    with pytest.raises(UsageError, match="BertModel has no language-model head"):
        skeleton.logits(hidden)


@pytest.mark.parametrize(
    ("name", "block"), [("model.layers.1.input_layernorm.weight", 1), ("model.layers.2.mlp.gate_proj.weight", 2)]
)
def test_a_nan_is_found_when_its_block_is_loaded(llama: Path, tmp_path: Path, name: str, block: int) -> None:
    tensors = load_file(llama / SINGLE)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / SINGLE)
    shutil.copy(llama / "config.json", tmp_path)
    skeleton = build(tmp_path)
    for index in range(3):
        if index == block:
            with pytest.raises(NonFiniteError, match=rf"{name}.*block {block}"):
                skeleton.load_block(index)
        else:
            skeleton.load_block(index)


def test_a_block_without_a_tensor_that_the_table_does_not_demand_is_refused(tmp_path: Path) -> None:
    write_model("bert", tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    del tensors["encoder.layer.0.output.LayerNorm.bias"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"block 0.*output\.LayerNorm\.bias"):
        build(tmp_path).load_block(0)


def test_a_compressed_tied_embedding_is_read_for_both_ends(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_model("llama-tied-biased", folder)
    codes = write_compressed(
        folder, tmp_path / "small", lambda x, _: make_scheme(8, "group", 8) if x.role == "embedding" else None
    )
    table = codes["model.embed_tokens"].dequantize()
    skeleton = build(tmp_path / "small")
    ids = random_ids(9)
    assert torch.equal(skeleton.embed(ids[None])[0], table[ids])
    assert skeleton.anatomy.head is not None
    assert torch.equal(skeleton.weight(skeleton.anatomy.head), table)
    hidden = torch.randn(1, 9, 32)
    torch.testing.assert_close(skeleton.logits(hidden), skeleton.head_inputs(hidden) @ table.T)
