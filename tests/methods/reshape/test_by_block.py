"""Widths of their own for every block: the loaded model is the original with the removed units at zero."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tests.parity.tiny_models import random_ids, reference_output

import fettle
from fettle.engine.engine import Engine
from fettle.engine.native_runner import NativeRunner
from fettle.engine.runners import open_engine
from fettle.engine.sequence import Request
from fettle.errors import CheckpointError, RecipeError, UsageError
from fettle.kernels import native
from fettle.methods.reshape.drop_layers import without_blocks
from fettle.methods.reshape.legal_widths import spread_units
from fettle.methods.reshape.narrow import Narrow
from fettle.methods.train import Distill
from fettle.methods.train.job import TrainJob
from fettle.methods.train.training import train
from fettle.models.block_widths import BY_BLOCK, WIDTHS_KEY
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load_checkpoint
from fettle.pipeline.recipe import parse_recipe

from .test_narrow import FAMILIES, bias_of, readers_of_units, removed_columns, weight_of
from .written import subject_of, tiny_subject, write_view

WINDOWS = tuple(random_ids(20, seed=seed) for seed in range(3))
DIFFERENT = sorted(name for name, family in FAMILIES.items() if family in BY_BLOCK)


@torch.no_grad()
@pytest.mark.parametrize("name", DIFFERENT)
def test_it_computes_what_the_original_does_without_the_units(name, tmp_path):
    model, subject = tiny_subject(name, tmp_path / "base", WINDOWS)
    with subject.workers:
        found = Narrow(neurons=0.5, heads=0.5, multiple=4, by_block=True).reshape(subject)
    for linear in readers_of_units(subject.anatomy):
        weight_of(model, linear)[:, removed_columns(found.view, linear)] = 0
    ids = random_ids(24)
    made = load_checkpoint(Checkpoint.open(write_view(found.view, tmp_path / "out"))).model
    torch.testing.assert_close(reference_output(made, ids), reference_output(model, ids), atol=5e-6, rtol=5e-5)
    table, blocks = found.view.config[WIDTHS_KEY], len(subject.anatomy.blocks)
    full = subject.anatomy.blocks[0]
    neurons = next(x.shape[1] for x in full.linears if x.role == "down")
    assert sum(table["neurons"]) == blocks * (neurons // 2 // 4 * 4) and all(n % 4 == 0 for n in table["neurons"])
    assert bias_of(model, full.linears[0]) is None or made.get_submodule(full.name) is not None


def test_units_go_where_they_are_missed_least():
    energies = [torch.tensor([9.0, 8, 7, 6]), torch.tensor([1.0, 1, 1, 1]), torch.tensor([5.0, 5, 0, 0])]
    assert spread_units(energies, 3, 2) == [2, 2, 2]
    assert spread_units(energies, 4, 2) == [4, 2, 2]
    assert spread_units(energies, 5, 1) == [3, 1, 1]
    assert spread_units([torch.arange(5.0)], 2, 2) == [4]


@pytest.fixture(scope="module")
def made(tiny_llama, text_file, tmp_path_factory):
    step = {"method": "narrow", "neurons": 0.5, "multiple": 8, "by_block": True}
    calibration = {"windows": 4, "length": 32, "text": str(text_file)}
    recipe = parse_recipe({"name": "own", "calibration": calibration, "steps": [step]}, "test")
    return fettle.compress(tiny_llama, tmp_path_factory.mktemp("own") / "out", recipe, evaluate=False), recipe


def test_the_engines_run_it_and_plain_transformers_refuses(made, tiny_llama):
    found, _ = made
    loaded = fettle.load(found.folder)
    prompt = tuple(loaded.tokenizer("def quick_1(brown, fox):")["input_ids"])
    ids = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    (told,) = open_engine(found.folder).generate([Request(prompt=prompt, max_tokens=8)])
    assert list(told.tokens) == ids
    if native.missing() is None:
        exact = NativeRunner.open(found.folder, pages=12, page_size=8, threads=1, integer=False, cache_type="float32")
        (same,) = Engine(exact).generate([Request(prompt=prompt, max_tokens=8)])
        assert list(same.tokens) == ids
    measured = fettle.evaluate(found.folder, reference=tiny_llama, max_tokens=128)
    assert measured.kl_mean is not None and measured.kl_mean > 0
    with pytest.raises(Exception, match=r"use fettle\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(found.folder)


def test_what_is_trained_is_refused_by_plain_transformers_too(made, text_file, tmp_path):
    folder, output = made[0].folder, tmp_path / "trained"
    how = {"steps": 1, "windows": 4, "length": 32, "batch_windows": 4, "held_back": 2, "text": str(text_file)}
    train(Distill(**how, hard=1.0, soft=0.0), TrainJob(model=folder, original=folder, output=output, folder=tmp_path))
    assert Checkpoint.open(output).config == Checkpoint.open(folder).config
    assert fettle.load(output).anatomy.blocks == fettle.load(folder).anatomy.blocks
    with pytest.raises(Exception, match=r"use fettle\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(output)


def test_fewer_blocks_keep_their_widths(made):
    subject = subject_of(made[0].folder)
    view = without_blocks(subject, [1])
    table = subject.checkpoint.config[WIDTHS_KEY]
    assert view.config[WIDTHS_KEY] == {name: values[1:] for name, values in table.items()}
    with pytest.raises(RecipeError, match="widths of their own already"):
        Narrow(neurons=0.5, score="magnitude", multiple=4).reshape(subject)


@pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")
def test_heads_that_differ_are_refused_by_the_native_engine(made, tmp_path):
    from fettle.engine.native_table import read_sizes

    config = json.loads((made[0].folder / "config.json").read_text())
    config[WIDTHS_KEY]["heads"] = [4, 2]
    plain = transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "quantization_config"})
    with pytest.raises(UsageError, match="the same heads"):
        read_sizes(plain, subject_of(made[0].folder).anatomy)


def test_codes_keep_other_loaders_away(made, tmp_path):
    recipe = parse_recipe({"steps": [{"method": "round_to_nearest", "bits": 4, "group_size": 8}]}, "test")
    fettle.compress(made[0].folder, tmp_path / "codes", recipe, evaluate=False)
    config = json.loads((tmp_path / "codes" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fettle"
    assert "widths of their own" in config["quantization_config"]["why"]


def test_what_cannot_be_is_refused(made, tmp_path):
    _, subject = tiny_subject("mixtral", tmp_path / "mixtral")
    with pytest.raises(RecipeError, match="widths of their own"), subject.workers:
        Narrow(neurons=0.5, score="magnitude", multiple=4, by_block=True).reshape(subject)
    checkpoint = Checkpoint.open(made[0].folder)
    checkpoint.config[WIDTHS_KEY]["neurons"] = [8]
    with pytest.raises(CheckpointError, match=r"fettle_widths\.neurons must list"):
        load_checkpoint(checkpoint)
