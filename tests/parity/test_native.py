"""The native decoder against transformers: logits and greedy tokens of every family, however the tokens are batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fettle.engine.native_runner import NativeRunner
from fettle.engine.runner import Piece, pack
from fettle.errors import UsageError
from fettle.kernels import native
from fettle.models.loading import load
from tests.parity.compressed import make_scheme, write_compressed
from tests.parity.tiny_models import TINY, random_ids, reference_output, write_model

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the native data plane is not built")

DECODERS = [name for name in TINY if not name.startswith("bert")]
TOKENS = 23
TOLERANCE = 0.03  # relative, of all logits: bytes for inputs through three blocks


def open_runner(folder: Path, **options: Any) -> NativeRunner:
    settings: dict[str, Any] = {"pages": 24, "page_size": 4, "threads": 2, "integer": False, "cache_type": "float32"}
    return NativeRunner.open(folder, **(settings | options))


def run_all(
    runner: NativeRunner, ids: list[int], pages: list[int], *, start: int = 0, known: int | None = None
) -> NDArray[np.float32]:
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


def test_neighbours_in_a_batch_change_nothing(tmp_path: Path) -> None:
    """Decoding, prefill and guesses mixed, other pages, other threads, pages copied: the same logits to the bit."""
    write_model("mistral", tmp_path)
    texts = [random_ids(count, seed=count).tolist() for count in (19, 7, 12)]
    runner = open_runner(tmp_path)
    alone = [run_all(runner, ids, pages_for(len(ids), 4)) for ids in texts]
    for options in ({"page_size": 4, "threads": 1}, {"page_size": 16}, {"page_size": 3, "pages": 40}):
        other = open_runner(tmp_path, **options)
        size = other.shape.page_size
        for ids, expected in zip(texts, alone, strict=True):
            found = run_all(other, ids, pages_for(len(ids), size))
            if size == 4:
                assert np.array_equal(found, expected)
            else:  # the softmax runs page by page, so its sums have another order
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    tables = [pages_for(len(ids), 4, first) for ids, first in zip(texts, (0, 6, 9), strict=True)]
    first = [
        Piece(tokens=texts[i][:cut], start=0, pages=tables[i], known=len(texts[i]), logits=0)
        for i, cut in ((0, 18), (1, 2), (2, 9))
    ]
    assert runner.run(pack(first)).shape == (0, 96)
    free = 20  # the last page of the first text goes elsewhere before its last token is written
    tables[0], moved = [*tables[0][:-1], free], (tables[0][-1], free)
    rest = [
        Piece(tokens=texts[i][cut:], start=cut, pages=tables[i], known=len(texts[i]), logits=len(texts[i]) - cut)
        for i, cut in ((0, 18), (1, 2), (2, 9))
    ]
    together = runner.run(pack(rest, [moved]))
    assert np.array_equal(together, np.concatenate([alone[0][18:], alone[1][2:], alone[2][9:]]))


SCHEMES = {
    "4-bit": make_scheme(4, "group", 16, scale_dtype="bfloat16"),
    "4-bit-asymmetric": make_scheme(4, "group", 24, zero_point=True),
    "3-bit": make_scheme(3, "group", 32, scale_dtype="float16"),
    "8-bit": make_scheme(8),
    "2-bit": make_scheme(2, "group", 8),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "qwen3_moe"])
def test_codes_give_what_the_reference_gives(name: str, scheme: str, tmp_path: Path) -> None:
    write_model(name, tmp_path / "whole")
    write_compressed(
        tmp_path / "whole", tmp_path / "codes", lambda linear, _: None if linear.role == "router" else SCHEMES[scheme]
    )
    ids = random_ids(TOKENS)
    with torch.no_grad():
        expected = load(tmp_path / "codes", verify=False).model(ids[None]).logits[0]
    pages = pages_for(TOKENS, 4)
    exact = torch.from_numpy(run_all(open_runner(tmp_path / "codes"), ids.tolist(), pages))
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=5e-5)
    rounded = torch.from_numpy(
        run_all(open_runner(tmp_path / "codes", integer=True, cache_type="float16"), ids.tolist(), pages)
    )
    error = ((rounded - expected).norm() / expected.norm()).item()
    assert 0 < error < TOLERANCE, error  # bytes for inputs, 16 bits for keys and values
    for kernels in ("portable",):
        other = run_all(
            open_runner(tmp_path / "codes", integer=True, cache_type="float16", kernels=kernels), ids.tolist(), pages
        )
        np.testing.assert_allclose(other, rounded.numpy(), rtol=0, atol=0.02 * float(expected.abs().max()))


def test_long_factors_hold_for_all_tokens_of_a_long_sequence(tmp_path: Path) -> None:
    model = write_model("phi3-longrope", tmp_path)
    runner = open_runner(tmp_path)
    assert runner.shape.rope_switch == 16
    for count in (9, 20):
        ids = random_ids(count)
        expected = reference_output(model, ids)[0]
        pages = pages_for(count, 4)
        rows = [run_all(runner, ids[a:b].tolist(), pages, start=a, known=count) for a, b in ((0, 4), (4, count))]
        torch.testing.assert_close(torch.from_numpy(np.concatenate(rows)), expected, rtol=1e-4, atol=2e-5)


def test_greedy_tokens_are_those_of_generate(tmp_path: Path) -> None:
    model: Any = write_model("qwen2", tmp_path)
    ids = random_ids(11)
    expected = model.generate(ids[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 11:]
    runner, pages, made = open_runner(tmp_path), pages_for(40, 4), ids.tolist()
    row = run_all(runner, made, pages)[-1]
    for _ in range(20):
        made.append(int(row.argmax()))
        row = run_all(runner, made[-1:], pages, start=len(made) - 1)[-1]
    assert made[11:] == expected.tolist()


def test_what_the_decoder_lacks_is_refused(tmp_path: Path) -> None:
    write_model("bert", tmp_path / "bert")
    with pytest.raises(UsageError, match="--engine torch"):
        open_runner(tmp_path / "bert")
    write_model("llama", tmp_path / "llama")
    with pytest.raises(UsageError, match="pages is 0"):
        open_runner(tmp_path / "llama", pages=0)
    with pytest.raises(UsageError, match="unknown cache type"):
        open_runner(tmp_path / "llama", cache_type="int3")
    runner = open_runner(tmp_path / "llama")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        run_all(runner, [96], [0])
    with pytest.raises(ValueError, match="page 24 is none"):
        run_all(runner, [5], [24])
    with pytest.raises(ValueError, match="no column"):
        run_all(runner, [5], [0], start=4)
