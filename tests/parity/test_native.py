"""The native decoder against transformers: logits and greedy tokens of every family, however the tokens are batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.parity.tiny_models import TINY, random_ids, reference_output, write_model

from fettle.engine.native_runner import NativeRunner
from fettle.engine.runner import Piece, pack
from fettle.kernels import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")

DECODERS = [name for name in TINY if not name.startswith("bert")]
TOKENS = 23


def open_runner(folder: Path, **options: Any) -> NativeRunner:
    settings: dict[str, Any] = {"pages": 24, "page_size": 4, "threads": 2, "integer": False, "cache_type": "float32"}
    return NativeRunner.open(folder, **(settings | options))


def run_all(runner: NativeRunner, ids: list[int], pages: list[int], *, start: int = 0, known: int | None = None) -> NDArray[np.float32]:
    piece = Piece(tokens=ids, start=start, pages=pages, known=known or start + len(ids), logits=len(ids))
    return runner.run(pack([piece]))


def pages_for(tokens: int, size: int, first: int = 0) -> list[int]:
    return list(range(first, first + -(-tokens // size)))[::-1]  # in no order that a bug would agree with


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path)
    ids = random_ids(TOKENS)
    expected = reference_output(model, ids)[0]
    runner = open_runner(tmp_path)
    pages = pages_for(TOKENS, 4)
    whole = torch.from_numpy(run_all(runner, ids.tolist(), pages))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=2e-5)
    # in chunks, over the same pages: every position is written again
    rows = [
        run_all(runner, ids[a:b].tolist(), pages[: -(-b // 4)], start=a, known=TOKENS)
        for a, b in ((0, 5), (5, 6), (6, 7), (7, 21), (21, 23))
    ]
    assert np.array_equal(np.concatenate(rows), whole.numpy())
