"""The original's states and gradients against the whole model under autograd."""

from __future__ import annotations

import pytest
import torch

from fettle.diagnose.original import Original
from fettle.models.loading import load


def test_nothing_changed_is_no_divergence(original: Original) -> None:
    assert original.kl([original.states[-1]]) == [0.0]
    again = original.run_on(0, [original.states[1]])[0]
    assert all(torch.equal(a, b) for a, b in zip(again, original.states[-1], strict=True))


def test_gradients_are_those_of_the_whole_model(original: Original) -> None:
    """The gradient of the summed loss of the same labels, by autograd through the loaded model."""
    model = load(original.checkpoint.folder).model
    name = original.anatomy.blocks[0].linears[0].name
    window, ids = 1, original.sample.ids[1]
    with torch.enable_grad():
        kept = {}
        module = model.get_submodule(name)
        handle = module.register_forward_hook(lambda _, __, output: kept.setdefault("y", output))
        model.get_input_embeddings().weight.requires_grad_(True)
        logits = model(ids[None]).logits[0, :-1]
        handle.remove()
        p = torch.softmax(logits.detach(), dim=-1)
        labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7919 * window))[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (expected,) = torch.autograd.grad(loss, [kept["y"]])
    original.load(0)
    found = original.activations(0)[name].gradients[0]
    start = sum(len(w) for w in original.sample.ids[:window])
    assert torch.allclose(found[start : start + len(ids)], expected[0], rtol=1e-3, atol=1e-5)


def test_changing_a_linear_is_what_the_whole_model_does(original: Original) -> None:
    linear = original.anatomy.blocks[1].linears[2]
    original.load(1)
    weight = original.skeleton.weight(linear)
    original.skeleton.set_weight_(linear, weight * 1.25)
    changed = original.run(1, original.states[1])
    original.skeleton.set_weight_(linear, weight)
    (kl,) = original.kl(original.run_on(1, [changed]))
    model = load(original.checkpoint.folder).model
    right = [torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1) for ids in original.sample.ids]
    model.get_submodule(linear.name).weight.mul_(1.25)
    wrong = [torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1) for ids in original.sample.ids]
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(right, wrong, strict=True))
    assert kl == pytest.approx(total / original.tokens, rel=1e-3)
