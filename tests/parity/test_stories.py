"""The perplexities that another program measured on a real model (see ../shared/assets/README.md)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import evaluation_windows, read_text
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.skeleton import Skeleton

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
MODEL, TEXT = ASSETS / "models" / "stories260K", ASSETS / "corpora" / "tinystories" / "valid.txt"
needs_assets = pytest.mark.skipif(not MODEL.is_dir() or not TEXT.is_file(), reason=f"{ASSETS} is not on this machine")


def perplexity(max_bytes: int) -> float:
    checkpoint = Checkpoint.open(MODEL)
    anatomy = read_anatomy(checkpoint)
    skeleton = Skeleton.build(checkpoint, anatomy)
    found = evaluation_windows(load_tokenizer(MODEL), read_text(TEXT), length=512, max_bytes=max_bytes)
    hidden = [skeleton.embed(ids[None]) for ids in found.ids]
    for block in anatomy.blocks:
        skeleton.load_block(block.index)
        hidden = [skeleton.run_block(block.index, h) for h in hidden]
        skeleton.free_block(block.index)
    total, count = 0.0, 0
    for ids, last in zip(found.ids, hidden, strict=True):
        losses = torch.nn.functional.cross_entropy(skeleton.logits(last)[0, :-1], ids[1:], reduction="sum")
        total, count = total + float(losses), count + len(ids) - 1
    return math.exp(total / count)


@pytest.mark.assets
@needs_assets
@pytest.mark.parametrize(("max_bytes", "expected", "digits"), [(24_000, 4.2088, 4), (200_000, 4.485, 3)])
def test_the_published_perplexity(max_bytes: int, expected: float, digits: int) -> None:
    assert round(perplexity(max_bytes), digits) == expected
