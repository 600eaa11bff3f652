"""An adapter's folder is read where it is whole and fits its base; each other case has a message of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fettle.errors import CheckpointError, FettleError, NonFiniteError, UsageError
from fettle.methods.train import Adapter
from fettle.methods.train.adapter_files import CONFIG, RECORD, WEIGHTS, write_adapter
from fettle.methods.train.adapters import load_adapters, merge_adapter, wrapped
from fettle.methods.train.curve import Curve
from fettle.models.loading import load

pytest.importorskip("peft")

Trained = Callable[..., tuple[Path, Curve]]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def deeper(folder: Path) -> None:
    """As if it came from a base of one block more, and from nobody known."""
    (folder / RECORD).unlink()
    tensors = load_file(folder / WEIGHTS)
    more = {name.replace("layers.1.", "layers.2."): value.clone() for name, value in tensors.items()}
    save_file(tensors | more, folder / WEIGHTS)


def shallower(folder: Path) -> None:
    (folder / RECORD).unlink()
    tensors = {name: value for name, value in load_file(folder / WEIGHTS).items() if "layers.1." not in name}
    save_file(tensors, folder / WEIGHTS)


def wider(folder: Path) -> None:
    (folder / RECORD).unlink()
    save_file({name: torch.cat([x, x], -1) for name, x in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def infinite(folder: Path) -> None:
    (folder / RECORD).unlink()
    save_file({name: value * torch.nan for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


@pytest.fixture
def adapter(tiny_llama: Path, trained: Trained) -> Path:
    return trained(Adapter, tiny_llama, steps=1, rank=2, targets="query,value")[0]


def test_an_adapter_that_is_damaged_or_does_not_fit_is_refused(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert json.loads((adapter / CONFIG).read_text())["target_modules"] == [
        f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in ("q_proj", "v_proj")
    ]  # a set of PEFT's, whose order differs from process to process
    cases: list[tuple[str, Callable[[Path], object]]] = [
        (r"adapter_model\.safetensors.* is damaged", lambda folder: cut(folder / WEIGHTS)),
        (r"adapter_model\.safetensors is damaged: its SHA-256", lambda folder: flip(folder / WEIGHTS)),
        (r"adapter_config\.json is damaged", lambda folder: cut(folder / CONFIG)),
        (r"fettle_adapter\.json is damaged", lambda folder: cut(folder / RECORD)),
        (r"does not fit .*8 tensors of it have no place", lambda folder: change(folder / CONFIG, '"LORA"', '"LOHA"')),
        (
            r"does not fit .*4 tensors of it have no place, .*q_proj",
            lambda folder: change(folder / CONFIG, "self_attn.q_proj", "nowhere"),
        ),
        (r"does not fit .*4 tensors of it have no place, .*layers\.2\.", deeper),
        (r"does not fit .*4 places got no tensor, .*layers\.1\.", shallower),
        (r"does not fit .*size mismatch", wider),
        (r"NaN or infinite", infinite),
        (r"it needs adapter_config\.json and adapter_model\.safetensors", lambda folder: (folder / CONFIG).unlink()),
    ]
    for number, (told, damage) in enumerate(cases):
        folder = tmp_path / f"case-{number}"
        shutil.copytree(adapter, folder)
        damage(folder)
        with pytest.raises(FettleError, match=told) as found:
            load_adapters(load(tiny_llama), {"mine": folder})
        assert isinstance(found.value, CheckpointError | NonFiniteError), told
        if number in (1, 6):
            with pytest.raises(CheckpointError, match=told):
                merge_adapter(tiny_llama, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for name in ("", "a.b"):
        with pytest.raises(UsageError, match="an adapter cannot be called"):
            load_adapters(load(tiny_llama), {name: adapter})


def test_what_is_not_finite_is_not_written(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = wrapped(load(tiny_llama).model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        next(x for name, x in model.named_parameters() if "lora_A" in name)[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="lora_A"):
        write_adapter(model, tiny_llama, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
