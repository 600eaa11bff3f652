"""Dropping blocks: the written files compute what transformers computes with these blocks skipped."""

from __future__ import annotations

import math

import pytest
import torch
from tests.parity.tiny_models import TINY, random_ids, reference_output
from torch import nn

from fettle.errors import RecipeError
from fettle.methods.registry import from_fields
from fettle.methods.reshape import block_scores
from fettle.methods.reshape.drop_layers import DropLayers, without_blocks
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint

from .written import output_of_files, subject_of, tiny_subject, write_view

WINDOWS = tuple(random_ids(20, seed=seed) for seed in range(3))


class Skipped(nn.Module):
    """Stands where a block was: hands its input on, in the way the family's blocks answer."""

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        for name in ("attention_type", "layer_type"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden, *args, **kwargs):
        return (hidden,) if self.returns_tuple else hidden


def skip(model: nn.Module, names: list[str], returns_tuple: bool) -> None:
    for name in names:
        path, _, number = name.rpartition(".")
        siblings = model.get_submodule(path)
        siblings[int(number)] = Skipped(siblings[int(number)], returns_tuple)


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_written_folder_is_the_model_without_the_blocks(name, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base")
    blocks = subject.anatomy.blocks
    kept = [index for index in range(len(blocks)) if index != 1]
    folder = write_view(without_blocks(subject, kept), tmp_path / "out")
    skip(model, [blocks[1].name], subject.anatomy.blocks_return_tuple)
    ids = random_ids(24)
    torch.testing.assert_close(output_of_files(folder, ids), reference_output(model, ids), atol=2e-6, rtol=2e-5)
    assert len(read_anatomy(Checkpoint.open(folder)).blocks) == len(kept)


def test_a_view_of_a_view_is_a_view(tmp_path):
    _, subject = tiny_subject("qwen2", tmp_path / "base")
    once = without_blocks(subject, [0, 2])
    inner = subject_of(tmp_path / "base")
    twice = without_blocks(
        type(inner)(checkpoint=once, anatomy=read_anatomy(once), windows=(), workers=inner.workers), [1]
    )
    direct = without_blocks(subject, [2])
    assert twice.config == direct.config
    assert twice.entries == direct.entries
    assert all(torch.equal(twice.read(key), direct.read(key)) for key in direct.entries)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_subject("llama", tmp_path_factory.mktemp("llama"), WINDOWS)


@torch.no_grad()
def states_of(model) -> list[list[torch.Tensor]]:
    """By block, what enters it; then what leaves the last: float64 [tokens, hidden] a window."""
    found: list[list[torch.Tensor]] = []
    for layer in model.model.layers:
        entered: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, read, into=entered: into.append(read[0][0].double()))
        for ids in WINDOWS:
            model(ids[None])
        handle.remove()
        found.append(entered)
    last: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, read: last.append(read[0][0].double()))
    for ids in WINDOWS:
        model(ids[None])
    handle.remove()
    return [*found, last]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_block_influence_is_the_papers(llama):
    model, subject = llama
    states = states_of(model)
    with subject.workers:
        found = block_scores.block_influence(subject)
    for index, value in enumerate(found):
        pairs = zip(states[index], states[index + 1], strict=True)
        assert value == pytest.approx(1 - torch.cat([cosine(a, b) for a, b in pairs]).mean().item(), abs=1e-6)


def test_angular_distance_is_the_papers(llama):
    model, subject = llama
    states = states_of(model)
    with subject.workers:
        found = block_scores.angular_distances(subject, 2)
    assert len(found) == 2
    for index, value in enumerate(found):
        pairs = zip(states[index], states[index + 2], strict=True)
        angles = torch.cat([torch.arccos(cosine(a, b)) / math.pi for a, b in pairs])
        assert value == pytest.approx(angles.mean().item(), abs=1e-6)


def test_greedy_drops_what_brute_force_drops(tmp_path):
    model, subject = tiny_subject("llama", tmp_path / "base", WINDOWS)
    layers = list(model.model.layers)

    @torch.no_grad()
    def loss(gone: set[int]) -> float:
        model.model.layers = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in gone)
        model.config.num_hidden_layers = len(layers) - len(gone)
        sums = [
            nn.functional.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="sum")
            for ids in WINDOWS
        ]
        return float(sum(sums)) / sum(len(ids) - 1 for ids in WINDOWS)

    first = min(range(3), key=lambda index: loss({index}))
    second = min((index for index in range(3) if index != first), key=lambda index: loss({first, index}))
    with subject.workers:
        found = DropLayers(drop=2, by="perplexity").reshape(subject)
    assert found.decided["dropped"] == sorted({first, second})
    assert found.decided["scores"] == pytest.approx([loss({first}), loss({first, second})], rel=1e-5)


@pytest.mark.parametrize("by", ["block_influence", "angular", "perplexity"])
def test_a_share_of_the_parameters_is_kept_to(llama, by):
    _, subject = llama
    with subject.workers:
        view = DropLayers(parameters="0.8x", by=by).reshape(subject).view
    count = sum(torch.Size(entry.shape).numel() for entry in view.entries.values())
    block = sum(torch.Size(subject.checkpoint.entry(n).shape).numel() for n in subject.anatomy.blocks[0].tensors)
    assert 0.8 * subject.parameters - block < count <= 0.8 * subject.parameters


def test_the_ends_are_kept_where_asked(llama):
    _, subject = llama
    with subject.workers:
        assert DropLayers(drop=1, keep_ends=True).reshape(subject).decided["dropped"] == [1]
        with pytest.raises(RecipeError, match="would drop 2 of 3 blocks, and at most 1 can go"):
            DropLayers(drop=2, keep_ends=True).reshape(subject)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "give one of them"),
        ({"drop": 1, "parameters": "0.5x"}, "give one of them"),
        ({"drop": 0}, "allowed: integers from 1"),
        ({"parameters": "60%"}, "such as 0.6x"),
        ({"parameters": "1.5x"}, "between 0 and 1"),
        ({"drop": 1, "by": "magnitude"}, "allowed: block_influence, angular, perplexity"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, why):
    with pytest.raises(RecipeError, match=why):
        from_fields("drop_layers", fields)


def test_shapes_that_cannot_be_are_refused(llama, tmp_path):
    _, subject = llama
    with pytest.raises(RecipeError, match="would drop 3 of 3 blocks"):
        DropLayers(drop=3).reshape(subject)
    with pytest.raises(RecipeError, match="would drop 3 of 3 blocks"):
        DropLayers(parameters="0.01x").reshape(subject)
    _, encoder = tiny_subject("bert", tmp_path / "bert", WINDOWS)
    with pytest.raises(RecipeError, match="no language-model head"):
        DropLayers(drop=1, by="perplexity").reshape(encoder)
