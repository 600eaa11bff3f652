"""Targets of time: with a clock that counts weights, predictions are exact and the target is met; the real one runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.parity.tiny_models import random_ids

import fettle
from fettle.cli.reshaping import reshaping_table
from fettle.engine.step_seconds import step_seconds
from fettle.errors import RecipeError, UsageError
from fettle.kernels import native
from fettle.methods.reshape.latency import Pieces, measured_pieces
from fettle.methods.reshape.legal_widths import Widths
from fettle.methods.reshape.narrow import Narrow
from fettle.methods.reshape.resize import Resize
from fettle.models.view import parameter_count
from fettle.pipeline.recipe import parse_recipe

from .written import tiny_subject

WINDOWS = tuple(random_ids(20, seed=seed) for seed in range(3))
measured: list[int] = []


def clock(checkpoint, *, engine, tokens):
    """A machine on which a step takes as long as there are parameters: exactly additive."""
    assert engine == "native"
    measured.append(checkpoint.config["num_hidden_layers"])
    return tokens * parameter_count(checkpoint) * 1e-6


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    measured.clear()
    return replace(tiny_subject("llama", tmp_path_factory.mktemp("timed") / "base", WINDOWS)[1], measure=clock)


def test_pieces_add_up_to_every_model(subject):
    pieces = measured_pieces(subject, lambda view: clock(view, engine="native", tokens=1), Widths.of(subject).hidden, 4)
    full, blocks = Widths.of(subject), len(subject.anatomy.blocks)
    for heads in pieces.heads:
        for share in (0.3, 0.6, 1.0):
            widths = full.shared(share, heads / full.heads.kv_heads, full.hidden, 4)
            assert pieces.model(blocks, widths) == pytest.approx(1e-6 * widths.parameters(subject), rel=1e-9)
    assert set(measured) <= {1, 2}  # two blocks at most are ever opened
    assert Pieces(rest=1.0, heads={1: 2.0}, neurons={4: 2.0}).block(1, 4) == 2.0


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_narrow_keeps_to_the_time(subject, target):
    with subject.workers:
        found = Narrow(latency=f"{target}x", multiple=4).reshape(subject)
    told = found.decided
    assert told["predicted_ms"] <= target * told["original_ms"] * (1 + 1e-9)
    assert told["predicted_ms"] == pytest.approx(1e3 * clock(found.view, engine="native", tokens=1), rel=1e-6)
    assert parameter_count(found.view) > (target - 0.1) * subject.parameters  # and not much less than it may
    with subject.workers:
        both = Narrow(latency="0.8x", parameters="0.6x", multiple=4).reshape(subject)
    assert parameter_count(both.view) <= 0.6 * subject.parameters


def test_resize_tries_depths_heads_and_widths_within_the_time(subject):
    with subject.workers:
        found = Resize(latency="0.6x", multiple=4).reshape(subject)
    tried = found.decided["candidates"]
    assert len({len(one["dropped"]) for one in tried}) > 1
    assert len({one["kept"]["kv_heads"] for one in tried if one["kept"]}) > 1
    assert all(one["predicted_ms"] <= 0.6 * found.decided["original_ms"] * (1 + 1e-9) for one in tried)
    assert found.decided["loss"] == min(one["loss"] for one in tried)
    table = reshaping_table({**found.decided, "parameters_before": subject.parameters, "parameters": 1})
    assert f"{found.decided['original_ms']:.3f}" in next(iter(table.columns[-1].cells))


def test_what_cannot_be_is_refused(subject):
    with pytest.raises(RecipeError, match="no share of the original"):
        Narrow(latency="half").validate()
    with pytest.raises(RecipeError, match="latency chooses the shares"):
        Narrow(latency="0.5x", heads=0.5).validate()
    with pytest.raises(RecipeError, match=r"of the time\. Give hidden"), subject.workers:
        Narrow(latency="0.01x", multiple=4).reshape(subject)
    with pytest.raises(RecipeError, match="nothing here measures"), subject.workers:
        Narrow(latency="0.5x").reshape(replace(subject, measure=None))
    with pytest.raises(UsageError, match="unknown engine"):
        step_seconds(subject.checkpoint, engine="nativ")
    with pytest.raises(UsageError, match="context holds"):
        step_seconds(subject.checkpoint, engine="native", tokens=10**6)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_recipe_measures_this_machine(tiny_llama, text_file, tmp_path, engine):
    if engine == "native" and native.missing() is not None:
        pytest.skip("the native data plane is not built")
    step = {"method": "narrow", "latency": "0.97x", "latency_engine": engine, "multiple": 4, "score": "magnitude"}
    calibration = {"windows": 2, "length": 32, "text": str(text_file)}
    recipe = parse_recipe({"name": "timed", "calibration": calibration, "steps": [step]}, "test")
    try:
        made = fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    except RecipeError as error:  # a machine so uneven that even the narrowest seems too slow says so with figures
        assert "of the time" in str(error)
        return
    (told,) = made.summary["reshaped"]
    pieces = told["pieces"]
    assert pieces["rest_ms"] >= 0 and len(pieces["block_ms_by_neurons"]) > 1
    assert 0 < told["predicted_ms"] <= 0.97 * told["original_ms"]
