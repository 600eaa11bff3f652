"""Narrowing: the written files compute what transformers computes with the removed units at zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity.tiny_models import TINY, random_ids, reference_output
from torch import nn

from fettle.errors import RecipeError
from fettle.methods.registry import from_fields
from fettle.methods.reshape.legal_widths import best_heads, legal_heads
from fettle.methods.reshape.narrow import Narrow
from fettle.methods.reshape.subject import Subject
from fettle.methods.reshape.unit_scores import unit_scores
from fettle.methods.reshape.widths import WRITERS, HeadShape, attention_of, head_shape, neuron_groups
from fettle.models.anatomy import Anatomy, Linear, read_anatomy
from fettle.models.families import FREE_HEAD_SIZE, FREE_WIDTH, find_family
from fettle.models.module_tree import part_of
from fettle.models.reshaped_config import require_known
from fettle.models.view import Cut, View

from .written import output_of_files, tiny_subject, write_view

WINDOWS = tuple(random_ids(20, seed=seed) for seed in range(3))
SCORES = ("contribution", "activation", "magnitude", "taylor", "hessian")
# transformers holds the long factors of Phi-3 against hidden / heads: see the refusal below
FAMILIES = {name: find_family(TINY[name][1]["model_type"]).name for name in TINY if "longrope" not in name}
FREE_HEADS = sorted(name for name, family in FAMILIES.items() if family in FREE_HEAD_SIZE)
FREE = sorted(name for name, family in FAMILIES.items() if family in FREE_WIDTH)


def weight_of(model: nn.Module, linear: Linear) -> torch.Tensor:
    """The weight [out, in] in the transformers model, as a view."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return part_of(parameters[linear.slot.parameter].data, linear)


def bias_of(model: nn.Module, linear: Linear) -> torch.Tensor | None:
    if linear.slot.index is not None:
        return None
    parameters = dict(model.named_parameters())
    found = parameters.get(f"{linear.slot.parameter.removesuffix('.weight')}.bias")
    return None if found is None else found.data


def removed_columns(view: View, linear: Linear) -> torch.Tensor:
    """The positions that the view's piece for this linear leaves out of its inputs."""
    piece = view.pieces[linear.weight_name]
    assert isinstance(piece, Cut)
    kept = piece.rows if linear.slot.transposed else piece.columns
    gone = torch.ones(linear.shape[1], dtype=torch.bool)
    if kept is None:
        return gone.logical_not()
    gone[kept] = False
    return gone


def readers_of_units(anatomy: Anatomy) -> list[Linear]:
    return [
        linear
        for block in anatomy.blocks
        for linear in [*(down for down, _ in neuron_groups(block)), attention_of(block)[0]]
    ]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=5e-5)


@pytest.mark.parametrize("name", sorted(TINY))
def test_neurons_that_go_are_neurons_at_zero(name, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base")
    view = Narrow(neurons=0.6, score="magnitude", multiple=4).reshape(subject).view
    folder = write_view(view, tmp_path / "out")
    lost = 0
    for linear in readers_of_units(subject.anatomy):
        gone = removed_columns(view, linear)
        lost += int(gone.sum())
        weight_of(model, linear)[:, gone] = 0
    assert lost
    ids = random_ids(24)
    assert_same(output_of_files(folder, ids), reference_output(model, ids))


@pytest.mark.parametrize("share", [0.5, 0.3])  # one of two groups; one head of one group
@pytest.mark.parametrize("name", FREE_HEADS)
def test_heads_that_go_are_heads_at_zero(name, share, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base")
    made = Narrow(heads=share, score="magnitude").reshape(subject)
    assert made.decided["kept"]["kv_heads"] == 1
    assert made.decided["kept"]["heads"] == {0.5: 2, 0.3: 1}[share]
    folder = write_view(made.view, tmp_path / "out")
    for block in subject.anatomy.blocks:
        output = attention_of(block)[0]
        weight_of(model, output)[:, removed_columns(made.view, output)] = 0
    ids = random_ids(24)
    assert_same(output_of_files(folder, ids), reference_output(model, ids))


@pytest.mark.parametrize("name", FREE)
def test_channels_that_go_are_channels_at_zero(name, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base")
    anatomy = subject.anatomy
    made = Narrow(hidden=0.7, score="magnitude", multiple=4)
    view = made.reshape(subject).view
    folder = write_view(view, tmp_path / "out")
    assert anatomy.embedding is not None
    gone = removed_columns(view, anatomy.embedding)
    assert int(gone.sum()) == 32 - 20
    weight_of(model, anatomy.embedding)[:, gone] = 0
    for linear in anatomy.linears():
        if linear.role in WRITERS:
            weight_of(model, linear)[gone] = 0
            bias = bias_of(model, linear)
            if bias is not None:
                bias[gone] = 0
    ids = random_ids(24)
    assert_same(output_of_files(folder, ids), reference_output(model, ids))


@pytest.fixture(scope="module", params=["phi3", "qwen3_moe"])
def scored(request, tmp_path_factory):
    return tiny_subject(request.param, tmp_path_factory.mktemp("scored"), WINDOWS)


@pytest.mark.parametrize("score", SCORES)
def test_everything_at_once_with_every_score(scored, score, tmp_path):
    _, subject = scored
    method = Narrow(neurons=0.6, heads=0.5, hidden=0.7, score=score, multiple=4)
    with subject.workers:
        view, again = (method.reshape(subject).view for _ in range(2))
    folder = write_view(view, tmp_path / "out")
    assert bool(torch.isfinite(output_of_files(folder, random_ids(24))).all())
    for name, piece in view.pieces.items():
        other = again.pieces[name]
        assert isinstance(piece, Cut) and isinstance(other, Cut)
        for kept in ("rows", "columns"):
            one, two = getattr(piece, kept), getattr(other, kept)
            assert (one is None) == (two is None) and (one is None or torch.equal(one, two))


@torch.enable_grad()
def brute_force(model: nn.Module, subject: Subject, linear: Linear, order: int) -> torch.Tensor:
    """Taylor scores of the units that `linear` reads, by a gate of ones on its inputs: ∂loss/∂gate = Σ a·g."""
    found = torch.zeros(linear.shape[1], dtype=torch.float64)
    module = model.get_submodule(linear.slot.parameter.removesuffix(".weight"))
    for ids in WINDOWS:
        gate = torch.ones(1, len(ids), linear.shape[1], requires_grad=True)
        handle = module.register_forward_pre_hook(lambda _, read, gate=gate: (read[0] * gate,))
        loss = nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        handle.remove()
        (products,) = torch.autograd.grad(loss, gate)
        by_unit = products[0].double()
        if linear.role == "output":
            by_unit = by_unit.view(len(ids), 4, -1).sum(2)
            found = found[:4]
        found = found + (by_unit.sum(0).abs() if order == 1 else by_unit.square().sum(0) / 2)
    return found


@pytest.mark.parametrize(("score", "order"), [("taylor", 1), ("hessian", 2)])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_gradient_scores_are_those_of_a_gate_on_the_unit(name, score, order, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base", WINDOWS)
    with subject.workers:
        found = unit_scores(subject, score)
    for linear in readers_of_units(subject.anatomy):
        table = found.heads if linear.role == "output" else found.neurons
        expected = brute_force(model, subject, linear, order)
        torch.testing.assert_close(table[linear.name], expected, rtol=2e-3, atol=1e-7)


def test_contribution_is_what_the_residual_stream_loses(tmp_path):
    model, subject = tiny_subject("llama", tmp_path / "base", WINDOWS)
    with subject.workers:
        found = unit_scores(subject, "contribution")
    block = subject.anatomy.blocks[1]
    output, shape = attention_of(block)[0], head_shape(subject)
    taken: list[torch.Tensor] = []
    module = model.get_submodule(output.name)
    handle = module.register_forward_pre_hook(lambda _, read: taken.append(read[0][0].double()))
    with torch.no_grad():
        for ids in WINDOWS:
            model(ids[None])
    handle.remove()
    inputs, weight = torch.cat(taken), weight_of(model, output).double()
    for head in range(shape.heads):
        part = slice(head * shape.size, (head + 1) * shape.size)
        expected = (inputs[:, part] @ weight[:, part].T).norm()
        assert float(found.heads[output.name][head]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "mixtral", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("share", [0.9, 0.8])
def test_a_share_of_the_parameters_is_kept_to(name, share, tmp_path):
    _, subject = tiny_subject(name, tmp_path / "base")
    made = Narrow(parameters=f"{share}x", score="magnitude", multiple=2).reshape(subject)
    count = sum(torch.Size(entry.shape).numel() for entry in made.view.entries.values())
    assert count <= share * subject.parameters
    assert count > (share - 0.1) * subject.parameters  # half of two key-value groups is a large step
    read_anatomy(made.view)


@settings(max_examples=60, deadline=None)
@given(
    kv=st.integers(1, 8), group=st.integers(1, 6), share=st.floats(0.01, 1.0), seed=st.integers(0, 100),
    size=st.integers(1, 4),
)  # fmt: skip
def test_heads_stay_legal(kv, group, share, seed, size):
    before, hidden = HeadShape(heads=kv * group, kv_heads=kv, size=4), kv * group * size
    try:
        after = legal_heads(before, share, hidden)
    except RecipeError:
        assert share * before.heads < 1
        return
    assert after.heads % after.kv_heads == 0 and hidden % after.heads == 0
    assert 1 <= after.heads <= max(1, share * before.heads + 1e-6)
    kept = best_heads(torch.rand(before.heads, generator=torch.Generator().manual_seed(seed)), before, after)
    assert len(set(kept.tolist())) == after.heads and kept.tolist() == sorted(kept.tolist())
    readers = [int((kept // before.group == g).sum()) for g in torch.unique(kept // before.group)]
    assert readers == [after.group] * after.kv_heads  # every key-value head is read by as many


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "nothing to narrow"),
        ({"parameters": "0.6x", "heads": 0.5}, "leave them out"),
        ({"heads": 0.0}, "numbers from 0.001 to 1.0"),
        ({"parameters": "half"}, "such as 0.6x"),
        ({"neurons": 0.5, "score": "random"}, "allowed: contribution, activation"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, why):
    with pytest.raises(RecipeError, match=why):
        from_fields("narrow", fields)


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("phi3-longrope", {"heads": 0.5}, "transformers refuses a phi3 model of this shape"),
        ("llama", {"heads": 0.2}, "leaves no head"),
        ("llama", {"neurons": 0.2, "multiple": 16}, "nothing would be left"),
        ("llama", {"parameters": "0.2x", "multiple": 4}, "cannot be reached with neurons and heads alone"),
        ("bert", {"heads": 0.5}, "heads of a bert model cannot go"),
        ("gpt2", {"heads": 0.5}, "heads of a gpt2 model cannot go"),
        ("gpt2", {"hidden": 0.5}, "hidden width of a gpt2 model cannot shrink"),
        ("gemma2", {"hidden": 0.5}, "hidden width of a gemma2 model cannot shrink"),
        ("bert", {"neurons": 0.5, "score": "taylor", "multiple": 4}, "no language-model head"),
    ],
)
def test_shapes_that_cannot_be_are_refused(name, fields, why, tmp_path):
    _, subject = tiny_subject(name, tmp_path / "base", WINDOWS)
    method = from_fields("narrow", {"score": "magnitude", **fields})
    with subject.workers, pytest.raises(RecipeError, match=why):
        require_known(method.reshape(subject).view.config)
