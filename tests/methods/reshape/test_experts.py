"""Fewer experts: the written files are the original whose router cannot choose the ones that went."""

from __future__ import annotations

import pytest
import torch
from tests.parity.tiny_models import random_ids, reference_output
from torch.overrides import TorchFunctionMode

from fettle.errors import RecipeError
from fettle.methods.registry import from_fields
from fettle.methods.reshape.experts import FewerExperts
from fettle.models.anatomy import read_anatomy
from fettle.models.module_tree import part_of
from fettle.models.storage import read_weight

from .written import output_of_files, tiny_subject, write_view

WINDOWS = tuple(random_ids(20, seed=seed) for seed in range(3))
FAMILIES = ("mixtral", "qwen3_moe")


class Forbidden(TorchFunctionMode):
    """Sets the logits of some experts to -∞, by the address of the router's weight."""

    def __init__(self, gone: dict[int, list[int]]) -> None:
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].data_ptr() in self.gone:
            result[..., self.gone[args[1].data_ptr()]] = -torch.inf
        return result


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("score", ["router", "magnitude"])
def test_experts_that_go_are_experts_that_nobody_chooses(name, score, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base", WINDOWS)
    with subject.workers:
        made = FewerExperts(experts=0.67, score=score).reshape(subject)
    folder = write_view(made.view, tmp_path / "out")
    gone = {}
    parameters = dict(model.named_parameters())
    for block in subject.anatomy.blocks:
        router = next((x for x in block.linears if x.role == "router"), None)
        if router is not None:
            kept = made.decided["kept"][str(block.index)]
            assert len(kept) == {4: 2, 6: 4}[router.shape[0]]
            weight = parameters[router.slot.parameter]
            gone[weight.data_ptr()] = [e for e in range(router.shape[0]) if e not in kept]
    assert gone
    ids = random_ids(24)
    with Forbidden(gone):
        expected = reference_output(model, ids)
    torch.testing.assert_close(output_of_files(folder, ids), expected, atol=5e-6, rtol=5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_experts_are_means_by_the_routers_mass(name, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base", WINDOWS)
    with subject.workers:
        plain = FewerExperts(experts=0.5 if name == "mixtral" else 0.34).reshape(subject)
        merged = FewerExperts(experts=0.5 if name == "mixtral" else 0.34, merge=True).reshape(subject)
    assert plain.decided["kept"] == merged.decided["kept"]
    write_view(merged.view, tmp_path / "out")
    found = read_anatomy(merged.view)
    block, before = found.blocks[0], subject.anatomy.blocks[0]
    parameters = dict(model.named_parameters())
    total = changed = 0.0
    for role in ("expert_up", "expert_down"):
        originals = torch.stack(
            [part_of(parameters[x.slot.parameter], x).detach() for x in before.linears if x.role == role]
        )
        for linear in (x for x in block.linears if x.role == role):
            weight = read_weight(merged.view, linear)
            shares = torch.linalg.lstsq(originals.flatten(1).T, weight.flatten()[:, None]).solution.flatten()
            torch.testing.assert_close(weight, torch.einsum("e,eoi->oi", shares, originals), atol=1e-5, rtol=1e-4)
            assert float(shares.sum()) == pytest.approx(1, abs=1e-4) and float(shares.min()) > -1e-4
            total += 1
            changed += float(shares.max()) < 1 - 1e-4
    assert total and changed  # some expert took another one in


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("mixtral", {"experts": 0.25}, "leaves 1 of 4 experts, and a token goes to 2"),
        ("llama", {}, "has no experts"),
    ],
)
def test_shapes_that_cannot_be_are_refused(name, fields, why, tmp_path):
    _, subject = tiny_subject(name, tmp_path / "base", WINDOWS)
    with pytest.raises(RecipeError, match=why):
        from_fields("fewer_experts", fields).reshape(subject)
