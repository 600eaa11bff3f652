"""Training text for encoders: a line is a window, begun and ended as the tokenizer does it, and padded."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from fettle.data.windows import Text, read_text
from fettle.errors import UsageError
from fettle.methods.train.options import LoopFields
from fettle.methods.train.text_mix import TrainingText, cut_texts


def sentences(tokenizer: Any, loop: LoopFields) -> TrainingText:
    """Lines of the texts as windows, drawn by the seed; the last lines of the text are held back.

    Raises:
        UsageError: no line to learn from or to hold back, or a tokenizer without padding.
    """
    if tokenizer.pad_token_id is None:
        raise UsageError(
            "this encoder's tokenizer has no padding token, so sentences cannot share a batch; "
            "name one as pad_token in tokenizer_config.json"
        )
    texts, counts = [read_text(loop.text)], [loop.windows]
    if loop.replay is not None:
        texts.append(read_text(loop.replay))
        counts.append(round(loop.windows * loop.replay_share))
        counts[0] -= counts[1]
    parts = cut_texts(texts, loop)
    learned: list[str] = []
    for number, ((first, _), count) in enumerate(zip(parts, counts, strict=True)):
        lines = _lines(first)
        generator = torch.Generator().manual_seed(loop.seed + number)
        learned += [lines[place] for place in torch.randperm(len(lines), generator=generator)[:count].tolist()]
    kept = _lines(parts[0][1])[: loop.held_back] if loop.held_back else []
    if not learned or (loop.held_back and not kept):
        raise UsageError(
            f"{texts[0].source} has too few lines to learn from and to hold back; give a text with a sentence a line"
        )
    drawn = tokenizer(learned + kept, padding="max_length", truncation=True, max_length=loop.length)
    return TrainingText(
        ids=torch.tensor(drawn["input_ids"]),
        learned=len(learned),
        sources=tuple(text.source for text in texts),
        sha256=hashlib.sha256("".join(text.sha256 for text in texts).encode()).hexdigest(),
        note="" if len(learned) == loop.windows else f"{len(learned)} lines of the {loop.windows} asked for",
    )


def _lines(text: Text) -> list[str]:
    return [line.strip() for line in text.content.splitlines() if line.strip()]
