"""Every grid, from the recipe to the reloaded folder: packed, stored, read back, multiplied, and refused by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import fettle
from fettle.layers import QuantizedLinear
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import read_quantized, stored_schemes
from fettle.tensors.levels import GridName

from .conftest import make_recipe

LAYOUTS: dict[str, dict[str, Any]] = {
    **{name: {"grid": name, "bits": None, "asymmetric": False} for name in get_args(GridName)},
    "mx float4": {"grid": "float", "asymmetric": False, "scale_dtype": "float8_e8m0fnu"},
    "nv float4": {"grid": "float", "asymmetric": False, "group_size": 16, "scale_dtype": "float8_e4m3fn"},
    "float8 a channel": {"grid": "float", "bits": 8, "asymmetric": False, "group_size": None},
    "shared by the tensor": {"grid": "learned", "bits": 5, "asymmetric": False, "granularity": "tensor"},
    "shared by a row": {"grid": "learned", "bits": 3, "asymmetric": False, "group_size": None},
}


@pytest.mark.parametrize("method", ["round_to_nearest", "gptq"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_what_runs(
    tiny_llama: Path, text_file: Path, tmp_path: Path, layout: str, method: str
) -> None:
    out = tmp_path / "out"
    made = fettle.compress(tiny_llama, out, make_recipe(text_file, method=method, **LAYOUTS[layout]))
    assert made.evaluation is not None and made.evaluation.kl_mean is not None
    loaded = fettle.load(out)
    checkpoint = Checkpoint.open(out)
    stored = stored_schemes(checkpoint, loaded.anatomy)
    assert len(stored) == 2 * 7
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        packed = loaded.model(ids).logits
        for linear in loaded.anatomy.linears():
            module = loaded.model.get_submodule(linear.name)
            assert isinstance(module, QuantizedLinear)
            dense = read_quantized(checkpoint, linear, stored[linear.name]).dequantize()
            assert torch.equal(module.dequantize(), dense)
            path, _, leaf = linear.name.rpartition(".")
            plain = torch.nn.Linear(linear.shape[1], linear.shape[0], bias=False)
            plain.weight.copy_(dense)
            setattr(loaded.model.get_submodule(path), leaf, plain)
        assert torch.allclose(loaded.model(ids).logits, packed, atol=1e-4)
    line = json.loads((out / "fettle.json").read_text())["ledger"][0]
    held = sum(e.nbytes for name, e in checkpoint.entries.items() if name.startswith(line["linear"] + "."))
    weights = loaded.anatomy.blocks[0].linears[0].shape
    assert line["bits_per_weight"] == 8 * held / (weights[0] * weights[1])


def test_shared_values_are_counted_by_the_formula_and_in_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(text_file, method="round_to_nearest", **LAYOUTS["shared by the tensor"])
    fettle.compress(tiny_llama, tmp_path / "out", recipe, evaluate=False)
    ledger = json.loads((tmp_path / "out" / "fettle.json").read_text())["ledger"]
    line = next(entry for entry in ledger if entry["linear"].endswith("0.mlp.up_proj"))
    weights = 172 * 64
    by_hand = weights * 16 / (weights * 5 + 32 * 16)
    assert f"32 shared values: n·b / (n·log2 k + k·b) = {by_hand:.3f}, in stored bytes " in line["note"]
    assert float(line["note"].rpartition(" ")[2]) == pytest.approx(16 / line["bits_per_weight"], abs=1e-3)


def test_coarse_grids_are_called_what_they_are(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text_file, grid="binary", bits=None, asymmetric=False)
    made = fettle.compress(tiny_llama, tmp_path / "out", recipe)
    page = made.report_path.read_text(encoding="utf-8")
    assert "as it is, it is of no use. Binary levels are too coarse for a model that was not trained with them." in page
    fine = fettle.compress(tiny_llama, tmp_path / "fine", make_recipe(text_file, bits=8))
    assert "of no use" not in fine.report_path.read_text(encoding="utf-8")
