"""Depth and widths together: the candidate with the least loss, every candidate within the target."""

from __future__ import annotations

import math

import pytest
import torch
from tests.parity.tiny_models import random_ids

from fettle.cli.recipe_choice import chosen_recipe
from fettle.cli.reshaping import reshaping_table
from fettle.errors import RecipeError
from fettle.methods.registry import from_fields
from fettle.methods.reshape.resize import Resize

from .written import tiny_subject, write_view

WINDOWS = tuple(random_ids(20, seed=seed) for seed in range(3))


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resize")
    _, subject = tiny_subject("llama", folder / "base", WINDOWS)
    with subject.workers:
        made = Resize(parameters="0.7x", multiple=4).reshape(subject)
    return subject, made, write_view(made.view, folder / "out")


def test_every_candidate_meets_the_target_and_the_best_is_taken(resized):
    subject, made, _ = resized
    tried = made.decided["candidates"]
    depths = [len(one["dropped"]) for one in tried]
    assert len(set(depths)) >= 2 and max(depths.count(depth) for depth in depths) <= 2
    assert len({(len(one["dropped"]), str(one["kept"])) for one in tried}) == len(tried)
    assert all(one["parameters"] <= 0.7 * subject.parameters for one in tried)
    assert made.decided["loss"] == min(one["loss"] for one in tried)
    assert made.view.config["num_hidden_layers"] == 3 - len(made.decided["dropped"])


def test_the_loss_is_that_of_the_written_files(resized):
    from transformers import LlamaForCausalLM

    _, made, folder = resized
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        sums = [
            torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            for ids in WINDOWS
        ]
    assert made.decided["loss"] == pytest.approx(float(sum(sums)) / sum(len(ids) - 1 for ids in WINDOWS), rel=1e-5)


def test_the_candidates_are_shown(resized):
    subject, made, _ = resized
    step = {**made.decided, "parameters_before": subject.parameters, "parameters": 1}
    assert reshaping_table(step).row_count == 1 + len(made.decided["candidates"])
    shown = list(reshaping_table(step).columns[-1].cells)
    assert f"{math.exp(made.decided['loss']):.3f}" in shown


def test_a_share_alone_means_resize():
    nothing = {"parameters": "0.6x", "windows": "4"}
    recipe = chosen_recipe(None, None, nothing)
    assert recipe.name == "resize-0.6x" and recipe.calibration.windows == 4


def test_what_cannot_be_reached_is_refused(resized, tmp_path):
    subject, _, _ = resized
    with subject.workers, pytest.raises(RecipeError, match="cannot be reached by fewer blocks and narrower ones"):
        Resize(parameters="0.1x").reshape(subject)
    with pytest.raises(RecipeError, match=r"such as 0\.6x"):
        from_fields("resize", {"parameters": "2x"})
