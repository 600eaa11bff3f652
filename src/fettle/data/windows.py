"""Text → windows of tokens, for calibration and for measuring.

Both start every window with the model's beginning-of-text token, because models are trained that way and the first
position otherwise measures its absence. Evaluation windows are consecutive and do not overlap, the last one is
shorter: the plainest definition of perplexity that two programs can agree on. Calibration windows start at random
places, by seed.

A tokenizer may have no beginning-of-text token (Qwen): then its end-of-text token takes the place, or none does, and
the `note` says so. Whatever else is not as asked (text too short) stands in the `note` too.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.errors import UsageError

EMBEDDED = {"calibration": "calibration.txt", "heldout": "heldout.txt"}


@dataclass(frozen=True)
class Text:
    """A text, where it came from, and the SHA-256 of its UTF-8 bytes."""

    content: str
    source: str
    sha256: str


@dataclass(frozen=True)
class Windows:
    """`ids`: int64 [tokens] each. `tokens`: all of them. `text_bytes`: UTF-8 bytes of text that the windows cover."""

    ids: tuple[Tensor, ...]
    tokens: int
    source: str
    sha256: str
    note: str
    text_bytes: int = 0


def read_text(path: str | Path | None = None, *, variant: str = "calibration") -> Text:
    """The text in `path`, or, without one, a text that the package ships: variant "calibration" or "heldout".

    Raises `UsageError` for a file that is missing, empty, or no UTF-8 text.
    """
    if path is None:
        if variant not in EMBEDDED:
            raise UsageError(f"no embedded text is called {variant!r}. Allowed: {', '.join(sorted(EMBEDDED))}")
        file = Path(str(importlib.resources.files("fettle.models"))) / "reference" / EMBEDDED[variant]
        source = f"embedded {variant} text"
    else:
        file, source = Path(path), str(path)
    try:
        file = file.expanduser()
        data = file.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user that there is not
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"the text {source} cannot be read ({why}). Give a UTF-8 text file.") from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the text {source} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}). Give plain text, or "
            "convert it: "
            "iconv -f <its encoding> -t utf-8."
        ) from error
    if "\0" in content:
        raise UsageError(f"the text {source} holds zero bytes, so it is a binary file. Give plain text.")
    if not content.strip():
        raise UsageError(f"the text {source} is empty. Give a file with some pages of text.")
    return Text(content, source, hashlib.sha256(data).hexdigest())


def calibration_windows(tokenizer: Any, text: Text, *, windows: int, length: int, seed: int) -> Windows:
    """`windows` windows of `length` tokens at random places of `text`; each is BOS and `length` - 1 tokens.

    A text too short for that many places gives the non-overlapping windows that it has, and the note says so.
    """
    _check_count("windows", windows, 1)
    _check_count("length", length, 2)
    first, note = _first_token(tokenizer)
    stream = _encode(tokenizer, text.content)
    step = length - len(first)
    if len(stream) < windows * step:
        starts = list(range(0, len(stream), step))[:windows]
        pieces = [stream[start : start + step] for start in starts]
        used = sum(len(piece) for piece in pieces)
        short = (
            f"{text.source} has {len(stream)} tokens, fewer than the {windows} × {step} asked for: "
            f"used {len(pieces)} windows without overlap, {used} tokens in all"
        )
        note = f"{short}; {note}" if note else short
    else:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(stream) - step + 1, (windows,), generator=generator).tolist()
        pieces = [stream[start : start + step] for start in starts]
    return _windows([torch.cat([first, piece]) for piece in pieces], text, note, len(text.content.encode()))


def evaluation_windows(
    tokenizer: Any, text: Text, *, length: int, max_bytes: int | None = None, max_tokens: int | None = None
) -> Windows:
    """Consecutive windows over `text` from its beginning: BOS and `length` - 1 tokens, no overlap, the last one
    shorter.

    `max_bytes` cuts the text first (a character cut in half is dropped); `max_tokens` the tokens after.
    """
    _check_count("length", length, 2)
    content = text.content
    if max_bytes is not None:
        _check_count("max_bytes", max_bytes, 1)
        content = content.encode()[:max_bytes].decode("utf-8", errors="ignore")
    first, note = _first_token(tokenizer)
    stream = _encode(tokenizer, content)
    covered = len(content.encode())
    if max_tokens is not None and len(stream) > max_tokens:
        _check_count("max_tokens", max_tokens, 1)
        stream = stream[:max_tokens]
        covered = len(tokenizer.decode(stream.tolist(), clean_up_tokenization_spaces=False).encode())
    if len(stream) + len(first) < 2:
        raise UsageError(
            f"the text {text.source} gives {len(stream)} tokens, too few to measure anything. Give a longer one."
        )
    step = length - len(first)
    pieces = [torch.cat([first, stream[start : start + step]]) for start in range(0, len(stream), step)]
    return _windows([piece for piece in pieces if len(piece) >= 2], text, note, covered)


def _windows(ids: list[Tensor], text: Text, note: str, text_bytes: int) -> Windows:
    return Windows(tuple(ids), sum(len(piece) for piece in ids), text.source, text.sha256, note, text_bytes)


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name} is {value}; it must be at least {least}.")


def _first_token(tokenizer: Any) -> tuple[Tensor, str]:
    """The token that begins a window (int64 [1], or [0] where there is none), and a note when it is not BOS."""
    for token, note in (
        (getattr(tokenizer, "bos_token_id", None), ""),
        (getattr(tokenizer, "cls_token_id", None), "windows begin with the classification token"),
        (getattr(tokenizer, "eos_token_id", None), "the tokenizer has no BOS token: windows begin with its EOS token"),
    ):
        if token is not None:
            return torch.tensor([token], dtype=torch.int64), note
    return torch.zeros(0, dtype=torch.int64), "the tokenizer has no BOS token: windows begin with the text itself"


def _encode(tokenizer: Any, content: str) -> Tensor:
    """int64 [tokens] of the text alone, without special tokens."""
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UsageError("the text gives no tokens at all. Give a file with some pages of text.")
    return torch.tensor(ids, dtype=torch.int64)
