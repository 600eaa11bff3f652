"""How matrices are stored: what cannot be understood, or is explained by nothing, is damage and never a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fettle
from fettle.errors import CheckpointError
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import SINGLE, Checkpoint
from fettle.models.storage import stored_schemes
from fettle.pipeline.recipe import parse_recipe

from ..parity.compressed import make_scheme, write_compressed

RECIPE = parse_recipe({"steps": [{"method": "round_to_nearest"}]}, "test")


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Block 1 in codes, as the standard says it."""
    folder = tmp_path_factory.mktemp("packed")
    write_compressed(llama, folder, lambda x, _: make_scheme(4, "group", 4) if x.block == 1 else None)
    return folder


@pytest.fixture(scope="module")
def own(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Block 1 in codes, as only fettle can say it: the groups do not divide the rows."""
    folder = tmp_path_factory.mktemp("own")
    write_compressed(llama, folder, lambda x, _: make_scheme(4, "group", 24) if x.block == 1 else None)
    return folder


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of `source` whose quantization_config is what `change` makes of it."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def refuse_everywhere(folder: Path, out: Path, match: str) -> None:
    """Every call that reads the model refuses it."""
    for call in (
        lambda: fettle.inspect(folder),
        lambda: fettle.load(folder),
        lambda: fettle.compress(folder, out, RECIPE, evaluate=False),
    ):
        with pytest.raises(CheckpointError, match=match):
            call()
    assert not out.exists()


@pytest.mark.parametrize("scheme", [make_scheme(4, "group", 4), make_scheme(8)], ids=["packed", "int8"])
def test_codes_without_a_quantization_are_no_weights(llama: Path, tmp_path: Path, scheme: Any) -> None:
    storage = "pack-quantized" if scheme.grid.bits == 4 else "int-quantized"
    choose = lambda x, _: scheme if x.block == 1 else None  # noqa: E731
    write_compressed(llama, tmp_path / "codes", choose, storage=storage)
    folder = changed(tmp_path / "codes", tmp_path / "silent", lambda _: None)
    refuse_everywhere(folder, tmp_path / "out", r"layers\.1\..*no quantization_config")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_whole_numbers_are_no_weights(llama: Path, packed: Path, tmp_path: Path, name: str) -> None:
    for number, source in enumerate((llama, packed)):
        folder = tmp_path / f"model-{number}"
        shutil.copytree(source, folder)
        tensors = load_file(folder / SINGLE)
        if name in tensors:
            tensors[name] = tensors[name].to(torch.int8)
            save_file(tensors, folder / SINGLE)
            refuse_everywhere(folder, tmp_path / "out", rf"{name}.*dtype int8")


def group(change: dict[str, Any]) -> Any:
    return lambda config: config | {"config_groups": {"g": config["config_groups"]["group_0"] | change}}


def weights(**change: Any) -> Any:
    return lambda config: group({"weights": config["config_groups"]["group_0"]["weights"] | change})(config)


@pytest.mark.parametrize(
    "change",
    [
        weights(group_size=0), weights(group_size="a"), weights(group_size=None), weights(group_size=[4]),
        weights(num_bits=4.0), group({"weights": "x"}), group({"targets": [5]}), group({"targets": ["re:["]}),
        group({"targets": None}), lambda c: c | {"config_groups": "x"}, lambda c: c | {"config_groups": {"a": None}},
        lambda c: c | {"config_groups": None},
    ],
)  # fmt: skip
def test_a_damaged_standard_config_is_named(packed: Path, tmp_path: Path, change: Any) -> None:
    checkpoint = Checkpoint.open(changed(packed, tmp_path / "copy", change))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: its quantization_config"):
        stored_schemes(checkpoint, read_anatomy(checkpoint))


@pytest.mark.parametrize(
    "change",
    [
        {"schemes": "x"}, {"schemes": []}, {"schemes": [5]}, {"schemes": [{"grid": [1]}]}, {"schemes": None},
        {"linears": "x"}, {"linears": {}}, {"storage": "zip"}, {"storage": None}, {"storage": "int-quantized"},
    ],
)  # fmt: skip
def test_a_damaged_config_of_fettles_own_is_named(own: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(changed(own, tmp_path / "copy", lambda config: config | change))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: its quantization_config"):
        stored_schemes(checkpoint, read_anatomy(checkpoint))


def test_codes_of_another_shape_are_named(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / SINGLE)
    stem = "model.layers.1.mlp"
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        tensors[f"{stem}.up_proj.{part}"] = tensors[f"{stem}.down_proj.{part}"].clone()
    save_file(tensors, tmp_path / "copy" / SINGLE)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj is stored with shape \[32, 44\], expected \[44, 32\]"):
        fettle.load(tmp_path / "copy")
