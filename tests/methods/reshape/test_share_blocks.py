"""Shared blocks: what is shared is the optimum, stored once, and every loader reads it or says why not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.parity.tiny_models import random_ids, reference_output

import fettle
from fettle.engine.engine import Engine
from fettle.engine.native_runner import NativeRunner
from fettle.engine.native_table import TableReader
from fettle.engine.runners import open_engine
from fettle.engine.sequence import Request
from fettle.errors import CheckpointError, FettleError, RecipeError, UsageError
from fettle.kernels import native
from fettle.methods.reshape.share_blocks import ShareBlocks
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.shared_tensors import is_part
from fettle.models.view import parameter_count
from fettle.pipeline.chain import chain_from_method
from fettle.pipeline.recipe import parse_recipe

from .written import output_of_files, tiny_subject, write_view

WINDOWS = tuple(random_ids(40, seed=seed) for seed in range(3))


def matrices(model, index):
    """The 2-D parameters of one block, by name."""
    return {n: p for n, p in model.model.layers[index].named_parameters() if p.dim() == 2}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_mean_of_neighbours_is_what_transformers_computes_with_it(family, tmp_path):
    model, subject = tiny_subject(family, tmp_path / "base")
    found = ShareBlocks(common="mean", written_out=True).reshape(subject)
    blocks = [model.get_submodule(block.name) for block in subject.anatomy.blocks]
    for first, *others in found.decided["shared"]:
        for name, parameter in blocks[first].named_parameters():
            if parameter.dim() == 2:
                same = [parameter, *(blocks[other].get_parameter(name) for other in others)]
                parameter.copy_(torch.stack(same).mean(0))
                for other in same[1:]:
                    other.copy_(parameter)
    ids = random_ids(24)
    folder = write_view(found.view, tmp_path / "out")
    torch.testing.assert_close(output_of_files(folder, ids), reference_output(model, ids), atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_the_regression_is_the_least_squares_over_both_blocks(tmp_path):
    model, subject = tiny_subject("llama", tmp_path / "base", WINDOWS)
    with subject.workers:
        view = ShareBlocks(damping=0.0).reshape(subject).view
    read: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for index, rows in read.items():
        module = model.model.layers[index].mlp.up_proj
        module.register_forward_hook(lambda _, x, __, rows=rows: rows.append(x[0][0].double()))
    for ids in WINDOWS:
        model(ids.reshape(1, -1))
    inputs = [torch.cat(read[index]) for index in (0, 1)]
    outputs = [x @ model.model.layers[i].mlp.up_proj.weight.double().T for i, x in enumerate(inputs)]
    best = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.T
    made = view.read("model.layers.1.mlp.up_proj.weight").double()
    torch.testing.assert_close(made, best, atol=2e-4, rtol=2e-3)


@torch.no_grad()
def test_differences_of_full_rank_give_the_model_back(tmp_path):
    _, subject = tiny_subject("gpt2", tmp_path / "base", WINDOWS)
    with subject.workers:
        view = ShareBlocks(difference_rank=10_000, written_out=True).reshape(subject).view
    matrices = [linear.weight_name for block in subject.anatomy.blocks[:2] for linear in block.linears]
    for name in matrices:
        torch.testing.assert_close(view.read(name), subject.checkpoint.read(name), atol=1e-5, rtol=1e-4)
    errors = []
    for rank in (0, 2, 8, 16):
        with subject.workers:
            errors.append(
                ShareBlocks(difference_rank=rank, written_out=True).reshape(subject).decided["output_errors"][0]
            )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_differences_that_would_take_more_than_the_matrices_are_refused_with_the_figures(tmp_path):
    _, subject = tiny_subject("llama", tmp_path / "base", WINDOWS)
    shapes = [linear.shape for linear in subject.anatomy.blocks[0].linears]
    most = min((2 - 1) * out * width / (2 * (out + width)) for out, width in shapes)  # where r(o+w)·2 + o·w = 2·o·w
    rank = 1000
    numbers = sum(out * width + 2 * min(rank, out, width) * (out + width) for out, width in shapes)
    with (
        subject.workers,
        pytest.raises(RecipeError, match=rf"rank=1000 .*hold [\d,]+ numbers.*rank up to {int(most)} "),
    ):
        ShareBlocks(difference_rank=rank).reshape(subject)
    with pytest.raises(
        RecipeError, match=f"{numbers:,} numbers, the blocks' own hold {2 * sum(o * w for o, w in shapes):,}"
    ):
        ShareBlocks(difference_rank=rank)._require_smaller(subject, [[0, 1]])
    with subject.workers:
        view = ShareBlocks(difference_rank=int(most)).reshape(subject).view
    assert parameter_count(view) < parameter_count(subject.checkpoint)


def recipe_of(text_file, *steps):
    calibration = {"windows": 4, "length": 32, "text": str(text_file)}
    return parse_recipe({"name": "shared", "calibration": calibration, "steps": list(steps)}, "test")


@pytest.fixture(scope="module", params=[0, 4])
def folder(request, tiny_llama, text_file, tmp_path_factory):
    step = {"method": "share_blocks", "difference_rank": request.param}
    out = tmp_path_factory.mktemp("shared") / "out"
    return request.param, fettle.compress(tiny_llama, out, recipe_of(text_file, step)).folder


def test_a_shared_matrix_is_stored_once_and_counted_once(folder, tiny_llama):
    rank, out = folder
    stored = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    checkpoint, original = Checkpoint.open(out), Checkpoint.open(tiny_llama)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert parameter_count(checkpoint) == sum(tensor.numel() for tensor in stored.values())
    assert set(original.entries) <= set(checkpoint.entries)
    block = [name for name in original.entries if ".layers.1." in name and len(original.entries[name].shape) == 2]
    assert not set(block) & set(stored)
    saved = sum(original.entries[name].nbytes for name in block)
    factors = sum(stored[name].nbytes for name in stored if "difference" in name)
    assert original.nbytes - checkpoint.nbytes == saved - factors
    assert (factors > 0) == (rank > 0) == any(is_part(name) for name in stored)
    measured = fettle.evaluate(out, max_tokens=128)
    assert measured.model_bits_per_weight == pytest.approx(16)
    assert checkpoint.verify_hashes() == len(stored)


def answer(runner, prompt):
    """Eight greedy tokens."""
    (made,) = Engine(runner).generate([Request(prompt=prompt, max_tokens=8)])
    return list(made.tokens)


@torch.no_grad()
def test_loader_and_engines_agree_and_transformers_refuses(folder):
    rank, out = folder
    loaded = fettle.load(out)
    first, second = (matrices(loaded.model, index) for index in (0, 1))
    assert all(torch.equal(first[name], second[name]) == (rank == 0) for name in first)
    prompt = tuple(loaded.tokenizer("def quick_1(brown, fox):")["input_ids"])
    ids = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    (torch_made,) = open_engine(out).generate([Request(prompt=prompt, max_tokens=8)])
    assert list(torch_made.tokens) == ids.tolist()
    if native.missing() is None:
        exact = NativeRunner.open(out, pages=12, page_size=8, threads=1, integer=False, cache_type="float32")
        assert answer(exact, prompt) == ids.tolist()
    with pytest.raises(Exception, match=r"use fettle\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")
def test_the_native_engine_keeps_a_shared_matrix_once(folder):
    from fettle._native import Pool

    rank, out = folder
    checkpoint = Checkpoint.open(out)
    table = TableReader(checkpoint, read_anatomy(checkpoint), Pool(1)).read()
    one, other = (block["query"]["matrix"] for block in table["blocks"])
    assert (one is other) == (rank == 0)


@torch.no_grad()
def test_written_out_it_is_an_ordinary_folder(folder, tiny_llama, text_file, tmp_path):
    rank, shared = folder
    step = {"method": "share_blocks", "difference_rank": rank, "written_out": True}
    out = fettle.compress(tiny_llama, tmp_path / "out", recipe_of(text_file, step), evaluate=False).folder
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(20).reshape(1, -1)
    torch.testing.assert_close(model(ids).logits, fettle.load(shared).model(ids).logits, atol=1e-5, rtol=1e-4)


def test_the_best_blocks_matrices_are_taken(tmp_path):
    _, subject = tiny_subject("llama", tmp_path / "base", WINDOWS)
    with subject.workers:
        found = ShareBlocks(common="block").reshape(subject)
    blocks, losses = found.decided["shared"][0], found.decided["losses"][0]
    best = blocks[losses.index(min(losses))]
    assert len(set(losses)) == len(losses) == len(blocks)
    for index in blocks:
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(found.view.read(name.format(index)), subject.checkpoint.read(name.format(best)))


def test_what_cannot_be_is_refused(folder, tiny_llama, text_file, tmp_path):
    _, out = folder
    step, codes = {"method": "share_blocks"}, {"method": "round_to_nearest", "bits": 4}
    for later in (codes, {"method": "drop_layers", "drop": 1}):
        with pytest.raises(RecipeError, match="let it come last"):
            fettle.compress(tiny_llama, tmp_path / "out", recipe_of(text_file, step, later))
    with pytest.raises(UsageError, match="compressed already"):
        fettle.compress(out, tmp_path / "out", recipe_of(text_file, codes))
    chain = chain_from_method("distill", {"steps": 1, "text": str(text_file), "length": 32})
    with pytest.raises(UsageError, match="train before share_blocks"):
        fettle.train(out, tmp_path / "trained", chain)
    single = fettle.compress(
        tiny_llama, tmp_path / "one", recipe_of(text_file, {"method": "drop_layers", "drop": 1}), evaluate=False
    )
    with pytest.raises(RecipeError, match="no neighbours"):
        fettle.compress(single.folder, tmp_path / "out", recipe_of(text_file, step))


def test_a_damaged_table_is_named(folder, tmp_path):
    _, out = folder
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    config = json.loads((copy / "config.json").read_text())
    table = config["quantization_config"]["shared"]
    name = next(iter(table))
    table[name] = "model.norm.weight"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit what the files hold"):
        Checkpoint.open(copy)
    config["quantization_config"]["shared"] = [name]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FettleError, match="table of tensor names"):
        Checkpoint.open(copy)
