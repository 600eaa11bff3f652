"""Sizes are what the headers say: masks are no parameters, biases no codes."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file, save_file

from fettle.evaluate.size import measure_size
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint


def measured(folder):
    checkpoint = Checkpoint.open(folder)
    return measure_size(checkpoint, read_anatomy(checkpoint))


def test_masks_and_frequencies_are_bytes_but_no_parameters(tiny_llama, tmp_path):
    plain = measured(tiny_llama)
    folder = tmp_path / "old"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 16, 16),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.position_ids": torch.arange(16)[None],
    }
    save_file(tensors | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    found = measured(folder)
    assert found.parameters == plain.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.tensor_bytes - plain.tensor_bytes == sum(tensor.nbytes for tensor in buffers.values())
    assert found.bytes == (folder / "model.safetensors").stat().st_size


def test_a_model_without_codes_has_the_bits_of_its_dtype(tiny_llama):
    found = measured(tiny_llama)
    assert found.bits_per_weight is None
    assert found.model_bits_per_weight == 16
