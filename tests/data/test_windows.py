"""Texts are read or refused in words; windows are what perplexity and calibration need, and say what is missing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fettle.data import windows as module
from fettle.data.tokenizer import has_tokenizer, load_tokenizer
from fettle.data.windows import Text, calibration_windows, evaluation_windows, read_text
from fettle.errors import ModelError, UsageError


class Letters:
    """One token a character: id = code point. A real enough tokenizer to count by hand."""

    def __init__(self, *, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int], *, clean_up_tokenization_spaces: bool) -> str:
        return "".join(map(chr, ids))


def text(content: str) -> Text:
    return Text(content, "somewhere", hashlib.sha256(content.encode()).hexdigest())


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def test_evaluation_windows_cover_every_token_once() -> None:
    found = evaluation_windows(Letters(), text(ALPHABET), length=8)
    assert [len(ids) for ids in found.ids] == [8, 8, 8, 6]
    assert all(ids[0] == 1 and ids.dtype == torch.int64 for ids in found.ids)
    assert "".join(chr(i) for ids in found.ids for i in ids[1:].tolist()) == ALPHABET
    assert (found.tokens, found.text_bytes, found.note) == (30, 26, "")


def test_evaluation_windows_are_cut_by_bytes_and_by_tokens() -> None:
    accents = "ä" * 10  # two bytes each
    by_bytes = evaluation_windows(Letters(), text(accents), length=4, max_bytes=7)
    assert sum(len(ids) - 1 for ids in by_bytes.ids) == 3 and by_bytes.text_bytes == 6
    by_tokens = evaluation_windows(Letters(), text(accents), length=4, max_tokens=5)
    assert sum(len(ids) - 1 for ids in by_tokens.ids) == 5 and by_tokens.text_bytes == 10


def test_calibration_windows_are_pieces_of_the_text_and_repeat_with_their_seed() -> None:
    long = text(ALPHABET * 40)
    first = calibration_windows(Letters(), long, windows=6, length=9, seed=3)
    again = calibration_windows(Letters(), long, windows=6, length=9, seed=3)
    other = calibration_windows(Letters(), long, windows=6, length=9, seed=4)
    assert len(first.ids) == 6 and all(len(ids) == 9 and ids[0] == 1 for ids in first.ids)
    assert all("".join(map(chr, ids[1:].tolist())) in long.content for ids in first.ids)
    assert all(torch.equal(a, b) for a, b in zip(first.ids, again.ids, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.ids, other.ids, strict=True))
    assert first.note == "" and first.sha256 == long.sha256


def test_a_short_text_is_used_whole_without_overlap_and_said() -> None:
    found = calibration_windows(Letters(), text(ALPHABET), windows=10, length=11, seed=0)
    assert "".join(chr(i) for ids in found.ids for i in ids[1:].tolist()) == ALPHABET
    assert "has 26 tokens, fewer than the 10 × 10 asked for" in found.note
    assert "used 3 windows without overlap, 26 tokens in all" in found.note


def test_without_bos_the_end_token_begins_or_nothing_does() -> None:
    with_eos = evaluation_windows(Letters(bos=None), text(ALPHABET), length=8)
    assert with_eos.ids[0][0] == 2 and "no BOS token" in with_eos.note
    bare = evaluation_windows(Letters(bos=None, eos=None), text(ALPHABET), length=8)
    assert [len(ids) for ids in bare.ids] == [8, 8, 8, 2] and "text itself" in bare.note
    assert "".join(chr(i) for ids in bare.ids for i in ids.tolist()) == ALPHABET
    short = calibration_windows(Letters(bos=None), text("abc"), windows=2, length=8, seed=0)
    assert "has 3 tokens" in short.note and "no BOS token" in short.note


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluation_windows(Letters(), text(ALPHABET), length=1), "length is 1; it must be at least 2"),
        (lambda: evaluation_windows(Letters(), text(ALPHABET), length=4, max_bytes=0), "max_bytes is 0"),
        (lambda: calibration_windows(Letters(), text(ALPHABET), windows=0, length=4, seed=0), "windows is 0"),
        (lambda: evaluation_windows(Letters(), text("é"), length=4, max_bytes=1), "no tokens"),
    ],
)
def test_impossible_windows_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        call()


def test_a_text_keeps_its_source_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    found = read_text(path)
    assert (found.content, found.source) == ("Grüße\n", str(path))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 .byte 0 is 0x89"),
        (b"abc\xff", "byte 3 is 0xff"),
        (b"a\0b", "binary"),
        (b" \n ", "is empty"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_text(path)


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path)
    with pytest.raises(UsageError, match="calibration, heldout"):
        read_text(variant="poem")


def test_without_a_path_the_embedded_text_is_used_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reference").mkdir()
    for name in ("calibration", "heldout"):
        (tmp_path / "reference" / f"{name}.txt").write_text(f"{name} words")
    monkeypatch.setattr(module.importlib, "resources", SimpleNamespace(files=lambda package: tmp_path))
    assert read_text().content == "calibration words"
    heldout = read_text(variant="heldout")
    assert (heldout.content, heldout.source) == ("heldout words", "embedded heldout text")


def test_a_real_tokenizer_makes_windows(tiny_llama: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    content = read_text(text_file)
    found = evaluation_windows(tokenizer, content, length=64)
    assert {int(ids[0]) for ids in found.ids} == {tokenizer.bos_token_id}
    assert tokenizer.decode(torch.cat([ids[1:] for ids in found.ids]).tolist()) == content.content
    assert found.text_bytes == len(content.content.encode())


def test_a_folder_without_a_tokenizer_has_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None and not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_the_home_of_nobody_is_no_text() -> None:
    with pytest.raises(UsageError, match="~nosuch/x cannot be read"):
        read_text("~nosuch/x")
