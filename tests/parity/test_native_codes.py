"""The native decoder on checkpoints that are pruned or quantize their inputs, and on a cache of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fettle
from fettle.cli.main import main
from fettle.engine.runner import Piece, pack
from fettle.engine.runners import RunnerOptions, open_engine
from fettle.errors import UsageError
from fettle.kernels import native
from fettle.models.loading import load
from fettle.pipeline.recipe import parse_recipe
from fettle.tensors.activations import Activations, InputQuantizer, InputScale
from tests.parity.test_native import TOKENS, open_runner, pages_for, run_all
from tests.parity.tiny_models import random_ids, write_model

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")

STEPS: dict[str, dict[str, Any]] = {
    "mask": {"method": "magnitude", "sparsity": 0.75},
    "2:4": {"method": "magnitude", "pattern": "2:4"},
    "mask, 4 bits": {"method": "magnitude", "sparsity": 0.8, "bits": 4, "group_size": 32},
    "mask, 4 bits, narrow groups": {"method": "magnitude", "sparsity": 0.5, "bits": 4, "group_size": 16},
    "int8 a token": {"method": "round_to_nearest", "bits": 8, "granularity": "channel", "activations": "dynamic"},
    "int8 a token, zero point": {
        "method": "round_to_nearest", "bits": 4, "group_size": 16, "activations": "dynamic",
        "activation_asymmetric": True,
    },
    "e4m3 a token": {
        "method": "round_to_nearest", "bits": 8, "granularity": "channel", "activations": "dynamic",
        "activation_grid": "float",
    },
}  # fmt: skip


def compressed(name: str, step: dict[str, Any], folder: Path) -> Path:
    write_model(name, folder / "whole")
    recipe = parse_recipe({"name": "small", "steps": [step]}, "test")
    fettle.compress(folder / "whole", folder / "small", recipe, evaluate=False)
    return folder / "small"


@pytest.mark.parametrize(
    ("name", "step"), [*(("llama", step) for step in STEPS), ("phi3", "mask, 4 bits"), ("phi3", "int8 a token")]
)
def test_logits_are_those_of_the_reference(name: str, step: str, tmp_path: Path) -> None:
    folder = compressed(name, STEPS[step], tmp_path)
    ids = random_ids(TOKENS)
    with torch.no_grad():
        expected = load(folder).model(ids[None]).logits[0]
    pages = pages_for(TOKENS, 4)
    exact = torch.from_numpy(run_all(open_runner(folder), ids.tolist(), pages))
    if "activations" in STEPS[step]:  # a sum at the border of two codes may fall on the other side
        assert (exact - expected).norm() < 0.02 * expected.norm()
        assert bool((exact - expected).abs().median() < 1e-3)
    else:
        torch.testing.assert_close(exact, expected, rtol=1e-4, atol=5e-5)
    rounded = torch.from_numpy(run_all(open_runner(folder, integer=True, cache_type="float16"), ids.tolist(), pages))
    limit = 0.06 if "activations" in STEPS[step] else 0.03  # a byte of an input more or less moves the next ones
    assert (rounded - expected).norm() < limit * expected.norm()


def test_pruned_tokens_are_the_same_alone_and_in_chunks(tmp_path: Path) -> None:
    folder = compressed("llama", STEPS["mask, 4 bits"], tmp_path)
    ids, pages = random_ids(TOKENS).tolist(), pages_for(TOKENS, 4)
    for integer in (False, True):
        runner = open_runner(folder, integer=integer)
        whole = run_all(runner, ids, pages)
        rows = [run_all(runner, ids[a:b], pages, start=a, known=TOKENS) for a, b in ((0, 3), (3, 4), (4, TOKENS))]
        assert np.array_equal(np.concatenate(rows), whole)


@pytest.mark.parametrize(
    "activations",
    [
        Activations(), Activations(bits=4), Activations(zero_point=True), Activations(bits=3, zero_point=True),
        Activations(grid="float"),
    ],
    ids=Activations.describe,
)  # fmt: skip
@pytest.mark.parametrize("static", [False, True])
def test_inputs_are_rounded_as_the_reference_rounds_them(activations: Activations, static: bool) -> None:
    """A product with the identity shows the values that were read, to the bit."""
    pool = native.plane().Pool(2)
    fixed = InputScale.spanning(-1.5, 2.0, activations, torch.float32) if static else None
    size = 77
    inputs = torch.randn(9, size) * torch.logspace(-3, 2, 9).unsqueeze(1)
    inputs[4] = 0
    inputs[5] = torch.arange(size) * 0.5 - 19.25  # the middle between codes
    expected = InputQuantizer(activations=activations, fixed=fixed)(inputs)
    eye = native.round_inputs(native.dense_matrix(torch.eye(size), pool), activations, fixed)
    for integer in (False, True):
        assert torch.equal(torch.from_numpy(eye.multiply(inputs.numpy(), pool, integer)), expected)


def test_a_scale_that_hangs_on_neighbours_is_refused() -> None:
    pool = native.plane().Pool(1)
    matrix = native.dense_matrix(torch.eye(2), pool)
    with pytest.raises(UsageError, match="beside it in a batch"):
        native.round_inputs(matrix, Activations(granularity="tensor"), None)
    with pytest.raises(ValueError, match="symmetric, asymmetric or e4m3"):
        native.plane().set_rounding(matrix, "odd", 8, 0.0, 0.0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_cache_of_codes_is_close_and_half_as_large(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    ids, pages = random_ids(TOKENS).tolist(), pages_for(TOKENS, 4)
    exact, coded = open_runner(tmp_path), open_runner(tmp_path, cache_type="int8")
    half = open_runner(tmp_path, cache_type="float16")
    size = half.shape.page_bytes
    assert coded.shape.page_bytes < size
    whole = run_all(coded, ids, pages)
    expected = run_all(exact, ids, pages)
    error = float(np.linalg.norm(whole - expected) / np.linalg.norm(expected))
    assert 0 < error < 0.02, error  # the stated tolerance; float16: below 0.001
    rows = [run_all(coded, ids[a:b], pages, start=a, known=TOKENS) for a, b in ((0, 6), (6, 7), (7, TOKENS))]
    assert np.array_equal(np.concatenate(rows), whole)
    # the last page goes elsewhere, scales and all, before the last token is read again
    moved = [*pages[:-1], 20]
    piece = Piece(tokens=ids[-1:], start=TOKENS - 1, pages=moved, known=TOKENS, logits=1)
    assert np.array_equal(coded.run(pack([piece], [(pages[-1], 20)]))[0], whole[-1])
    portable = run_all(open_runner(tmp_path, cache_type="int8", kernels="portable"), ids, pages)
    assert float(np.linalg.norm(portable - whole) / np.linalg.norm(whole)) < 0.01


def test_the_flag_is_the_native_engines(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "demo", "--prompt", "def add(a, b):", "--max-tokens", "6", "--threads", "1"]
    assert main([*command, "--engine", "native", "--cache-bits", "8"]) == 0
    coded = capsys.readouterr().out
    assert main([*command, "--engine", "native"]) == 0
    assert coded == capsys.readouterr().out
    assert main([*command, "--engine", "native", "--cache-bits", "4"]) != 0
    assert "codes of 8 bits" in capsys.readouterr().err
    with pytest.raises(UsageError, match="native engine's"):
        open_engine("demo", engine="torch", runner=RunnerOptions(cache_type="int8"))
