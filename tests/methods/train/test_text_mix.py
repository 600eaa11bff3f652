"""Windows to learn from and windows held back: apart, in the order of the seed, mixed as asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.errors import UsageError
from fettle.methods.train.options import LoopFields
from fettle.methods.train.text_mix import learning_part, training_text


def fields(text: Path, **other: object) -> LoopFields:
    return LoopFields(**{"text": str(text), "windows": 10, "length": 16, "held_back": 3, **other})  # type: ignore[arg-type]


def test_no_window_held_back_is_learned_from(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "numbers.txt"
    text.write_text("\n".join(f"line {number} of many" for number in range(400)))
    tokenizer = load_tokenizer(tiny_llama)
    found = training_text(tokenizer, fields(text, windows=60))
    words = [tokenizer.decode(ids.tolist()) for ids in found.ids]
    last = max(
        int(part.split()[0]) for w in words[: found.learned] for part in w.split("line ")[1:] if part[:1].isdigit()
    )
    assert len(found.held_back) == 3
    assert all("line 38" in words[i] or "line 39" in words[i] for i in found.held_back.tolist())
    assert last < 382


def test_a_pass_takes_every_window_once_and_passes_differ(tiny_llama: Path, text_file: Path) -> None:
    found = training_text(load_tokenizer(tiny_llama), fields(text_file))
    places = torch.arange(30)
    order = found.order(steps=6, batch_windows=5, seed=0)[places]
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    endless = found.order(10_000_000, 5, 0)  # of a run that minutes bound: the same, drawn no further than asked
    assert len(endless) == 50_000_000
    assert torch.equal(order[25:], endless[places[25:]])
    assert torch.equal(order[:25], endless[places[:25]])
    assert not torch.equal(order, found.order(6, 5, 1)[places])


def test_a_share_of_the_windows_comes_from_the_replayed_text(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.txt"
    old.write_text("zz " * 800)
    found = training_text(load_tokenizer(tiny_llama), fields(text_file, replay=str(old), replay_share=0.3))
    words = [load_tokenizer(tiny_llama).decode(ids.tolist()) for ids in found.ids[: found.learned]]
    assert sum("zz zz" in word for word in words) == 3
    assert found.learned == 10


def test_a_text_too_short_is_refused_with_the_way_out(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def f(): pass\n")
    with pytest.raises(UsageError, match=r"too short for windows of 16 tokens.*held_back: 0"):
        training_text(load_tokenizer(tiny_llama), fields(text))


def test_a_text_of_its_own_is_held_back_and_none_is_cut(tiny_llama: Path, tmp_path: Path) -> None:
    text, other = tmp_path / "numbers.txt", tmp_path / "other.txt"
    text.write_text("\n".join(f"line {number} of many" for number in range(100)))
    other.write_text("zz " * 400)
    tokenizer = load_tokenizer(tiny_llama)
    asked = fields(text, windows=1000, held_back_text=str(other))
    found = training_text(tokenizer, asked)
    words = [tokenizer.decode(ids.tolist()) for ids in found.ids]
    assert [("zz" in word) for word in words] == [False] * found.learned + [True] * 3
    assert learning_part(asked).content == text.read_text()
    assert found.learned > training_text(tokenizer, fields(text, windows=1000)).learned


def test_a_replayed_text_without_a_window_is_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one two")
    with pytest.raises(UsageError, match=r"short\.txt has no window of 16 tokens"):
        training_text(load_tokenizer(tiny_llama), fields(text_file, replay=str(short)))
