"""Principal directions: turning changes nothing, what is cut is the least of the stream, and it is a plain model."""

from __future__ import annotations

import pytest
import torch
from tests.parity.tiny_models import random_ids, reference_output

from fettle.errors import RecipeError
from fettle.methods.reshape.narrow import Narrow
from fettle.methods.reshape.principal import principal_directions, turned
from fettle.models.loading import load_checkpoint

from .written import output_of_files, tiny_subject, write_view

WINDOWS = tuple(random_ids(40, seed=seed) for seed in range(3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "qwen3_moe"])
def test_turning_changes_nothing_and_the_directions_are_those_of_the_norms_outputs(name, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base", WINDOWS)
    seen = []

    def note(module, inputs, output):
        weight = module.weight.double()
        seen.append(output[0].double() / weight)

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(note)
        if not hasattr(layer.mlp, "experts"):
            layer.post_attention_layernorm.register_forward_hook(note)
    for ids in WINDOWS:
        model(ids.reshape(1, -1))
    with subject.workers:
        basis = principal_directions(subject)
    if name != "qwen3_moe":
        stream = torch.cat(seen)
        expected = torch.linalg.eigvalsh(stream.T @ stream).flip(0)
        torch.testing.assert_close(basis.energies, expected, rtol=1e-4, atol=1e-3)
    width = len(basis.energies)
    eye = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(basis.directions.T @ basis.directions, eye, atol=1e-9, rtol=0)
    ids = random_ids(24)
    made = load_checkpoint(turned(subject, basis).checkpoint).model
    torch.testing.assert_close(reference_output(made, ids), reference_output(model, ids), atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_a_stream_of_few_dimensions_is_cut_without_loss(tmp_path):
    from transformers import LlamaForCausalLM

    _, subject = tiny_subject("llama", tmp_path / "base", WINDOWS)
    folder = tmp_path / "base"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = model.config.hidden_size
    plane = torch.linalg.qr(torch.randn(width, width // 2, generator=torch.Generator().manual_seed(0))).Q
    project = plane @ plane.T
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(project @ linear.weight)
    model.save_pretrained(folder)
    from .written import subject_of

    subject = subject_of(folder, WINDOWS)
    with subject.workers:
        found = Narrow(hidden=0.5, channels="principal", multiple=4).reshape(subject)
        plain = Narrow(hidden=0.5, multiple=4).reshape(subject)
    assert found.decided["kept_energy"] == pytest.approx(1, abs=1e-6)
    ids, expected = random_ids(24), reference_output(model, random_ids(24))
    sliced = output_of_files(write_view(found.view, tmp_path / "out"), ids)
    torch.testing.assert_close(sliced, expected, atol=2e-5, rtol=2e-4)
    cut = output_of_files(write_view(plain.view, tmp_path / "plain"), ids)
    assert (cut - expected).norm() > 100 * (sliced - expected).norm()


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="say how far with hidden"):
        Narrow(neurons=0.5, channels="principal").validate()
    with pytest.raises(RecipeError, match="leave parameters and latency out"):
        Narrow(hidden=0.5, parameters="0.5x", channels="principal").validate()
    _, subject = tiny_subject("gpt2", tmp_path / "base", WINDOWS)
    with pytest.raises(RecipeError, match="hidden width of a gpt2"), subject.workers:
        Narrow(hidden=0.5, channels="principal", multiple=4).reshape(subject)
