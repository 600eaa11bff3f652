"""Adapters beside pruned bases: what is merged is what was trained, and the mask is the one that was there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fettle
from fettle.errors import RecipeError
from fettle.methods.train import Adapter
from fettle.methods.train.adapters import merge_adapter
from fettle.methods.train.curve import Curve
from fettle.methods.train.options import LoopFields
from fettle.methods.train.text_mix import training_text
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load
from fettle.models.storage import stored_schemes
from fettle.pipeline.recipe import parse_recipe

from .conftest import SMALL

pytest.importorskip("peft")

Trained = Callable[..., tuple[Path, Curve]]
HOW: dict[str, Any] = {"steps": 6, "learning_rate": 5e-3, "hard": 0.0, "soft": 1.0, "rank": 4, "merge": True}


@pytest.fixture(scope="module")
def half(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Half of the weights gone: with a mask, with a mask and codes, and as plain zeros."""
    folder = tmp_path_factory.mktemp("half")
    step = {"method": "magnitude", "sparsity": 0.5}
    forms = {
        "masked": {"steps": [step]},
        "codes": {"steps": [{**step, "bits": 4, "group_size": 32}]},
        "dense": {"steps": [step], "storage": "dense"},
    }
    for name, form in forms.items():
        fettle.compress(tiny_llama, folder / name, parse_recipe({"name": name, **form}, "test"), evaluate=False)
    return {name: folder / name for name in forms}


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load(folder, dense=True)
    return {x.name: loaded.model.get_parameter(x.slot.parameter).detach() for x in loaded.anatomy.linears()}


def schemes(folder: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    return {name: found.scheme for name, found in stored_schemes(checkpoint, read_anatomy(checkpoint)).items()}


def held_back_kl(student: Path, teacher: Path, text_file: Path) -> float:
    """Of the windows that the trainings hold back."""
    loaded = load(student)
    text = training_text(loaded.tokenizer, LoopFields(**{**SMALL, "text": str(text_file)}))
    ids = text.ids[text.held_back]
    with torch.no_grad():
        ours, theirs = (
            m.model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            for m in (loaded, load(teacher))
        )
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


KINDS = ["lora", "dora", "lora_sb", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in ("rslora", "ia3"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_heals_inside_the_mask(
    kind: str, half: dict[str, Path], tiny_llama: Path, text_file: Path, trained: Trained
) -> None:
    output, curve = trained(Adapter, half["masked"], tiny_llama, **HOW, kind=kind)
    before, after = matrices(half["masked"]), matrices(output)
    for name, weight in before.items():
        assert torch.equal(after[name] == 0, weight == 0), name
        assert 0.49 < float((weight == 0).float().mean()) < 0.51
        assert not torch.equal(after[name], weight) or kind == "ia3"
    assert schemes(output) == schemes(half["masked"])
    assert curve.best is not None
    less = 0.97 if kind in ("lora", "dora") else 0.995  # few numbers, few steps
    assert curve.best[1] < less * curve.held_back[0][1]
    # what was trained is what is merged, but for the rounding to bfloat16
    assert held_back_kl(output, tiny_llama, text_file) == pytest.approx(curve.best[1], rel=0.01)


def test_zeros_of_dense_matrices_stay_where_it_is_asked_for(
    half: dict[str, Path], tiny_llama: Path, trained: Trained
) -> None:
    assert not schemes(half["dense"])
    kept, _ = trained(Adapter, half["dense"], tiny_llama, **HOW, keep_zeros=True)
    before, after = matrices(half["dense"]), matrices(kept)
    assert all(torch.equal(after[name] == 0, weight == 0) for name, weight in before.items())
    assert not schemes(kept)  # so that a later stage can give it codes
    with pytest.raises(RecipeError, match="keep_zeros is for what is merged"):
        Adapter(keep_zeros=True).validate()


def test_a_pruned_base_of_codes_is_merged_in_plain_values(
    half: dict[str, Path], tiny_llama: Path, trained: Trained, tmp_path: Path
) -> None:
    """Also by hand, of an adapter that was trained to stand beside it."""
    beside, _ = trained(Adapter, half["codes"], tiny_llama, **{**HOW, "merge": False, "steps": 2})
    merge_adapter(half["codes"], beside, tmp_path / "merged")
    before, after = matrices(half["codes"]), matrices(tmp_path / "merged")
    for name, scheme in schemes(tmp_path / "merged").items():
        assert scheme.values is None
        assert scheme.value_dtype == "bfloat16"
        assert not after[name][before[name] == 0].any()
        assert not torch.equal(after[name], before[name])
    assert Checkpoint.open(tmp_path / "merged").verify_hashes() > 0
