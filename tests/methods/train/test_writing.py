"""What is written has been fetched from wherever it was trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fettle.methods.train.writing import _unit
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load


class Elsewhere:
    """A tensor of another device, as far as writing sees it: nothing but `cpu()` gives numbers."""

    def cpu(self) -> torch.Tensor:
        return torch.tensor([3])


def test_codes_are_fetched_from_their_device(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    linear = loaded.anatomy.blocks[0].linears[0]
    codes: Any = SimpleNamespace(
        shape=linear.shape,
        scheme=SimpleNamespace(storage_for=lambda shape, storage: storage),
        to_state=lambda storage: {"weight_packed": Elsewhere()},
    )
    found = dict(_unit(loaded.model, Checkpoint.open(tiny_llama), loaded.anatomy, ((), (linear,)),
                       {linear.name: codes}, "pack-quantized"))  # fmt: skip
    assert [value.tolist() for value in found.values()] == [[3]]
