"""Sequence-level distillation: the teacher writes, and the student reads what it wrote.

Kim & Rush 2016, https://arxiv.org/abs/1606.07947: the loss over all sequences under the teacher's distribution is
taken at sequences that the teacher itself makes. Theirs is the likeliest sequence (beam search, of a translation);
ours is drawn at `sampling_temperature` from beginnings of the corpus, `prompt_tokens` long, since a language model's
likeliest text repeats itself. With `hard: 1, soft: 0` it is theirs; with `soft` the teacher's probabilities are
compared on its own text.

What passes over is text, tokenized anew, so teacher and student may have different tokenizers. Several teachers write
in turn. Chunks of 8 texts are kept beside the checkpoints, each written at once; a killed run goes on with the one that
is missing, and every text depends on its own seed, so the whole is the same.

Cost: `length` decoding steps of the teacher for 16 texts at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fettle.data.windows import Text, calibration_windows
from fettle.errors import UsageError
from fettle.methods.train.kept import recall_json
from fettle.methods.train.options import LoopFields
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.sources.on_policy import Completer
from fettle.methods.train.text_mix import drawing_seed
from fettle.models.loading import LoadedModel
from fettle.models.writer import write_json
from fettle.progress import Progress

CHUNK = 8
IDENTITY = "identity.json"


def written_text(
    teachers: Sequence[Callable[[], LoadedModel]], complete: Completer, text: Text,
    fields: tuple[LoopFields, DataFields], folder: Path, identity: dict[str, Any], progress: Progress,
) -> Text:  # fmt: skip
    """What the teachers wrote from beginnings of `text`, as one text.

    Args:
        teachers: how each is loaded; only those that have something left to write are.
        complete: who writes with them.
        text: the corpus, without what is held back.
        fields: how many windows, how long, from which prompts.
        folder: for chunks.
        identity: which teachers.
        progress: told of every chunk.

    Raises:
        UsageError: `folder` holds what others wrote, or a teacher without a tokenizer.
    """
    loop, data = fields
    count = max(1, round(loop.windows * data.written))
    told = {**identity, "text": text.sha256, "texts": count, "length": loop.length, "seed": loop.seed,
            "prompt_tokens": data.prompt_tokens, "temperature": data.sampling_temperature}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / IDENTITY
    if known.is_file() and recall_json(known) != told:
        raise UsageError(f"{folder} holds what another teacher wrote, or from another text; remove it, or --fresh")
    write_json(known, told)
    chunks = {first: folder / f"written-{first:08d}.json" for first in range(0, count, CHUNK)}
    with progress.task("teacher writes", len(chunks)) as task:
        for number, load in enumerate(teachers):
            mine = [first for place, first in enumerate(chunks) if place % len(teachers) == number]
            missing = [first for first in mine if not chunks[first].is_file()]
            task.advance(len(mine) - len(missing))
            if missing:
                teacher = load()
                for first in missing:
                    write_json(chunks[first], _chunk(teacher, complete, text, fields, first, min(CHUNK, count - first)))
                    task.advance()
    texts = [text for path in chunks.values() for text in recall_json(path)]
    content = "\n".join(texts)
    return Text(content, "the teacher's text", hashlib.sha256(content.encode()).hexdigest())


def _chunk(
    teacher: LoadedModel, complete: Completer, text: Text, fields: tuple[LoopFields, DataFields], first: int, count: int
) -> list[str]:
    loop, data = fields
    seed = drawing_seed(loop.seed, first)
    if teacher.tokenizer is None:
        raise UsageError(f"the teacher {teacher.folder} has no tokenizer, so it cannot write; name another teacher")
    drawn = calibration_windows(teacher.tokenizer, text, windows=count, length=data.prompt_tokens, seed=seed)
    whole = [ids for ids in drawn.ids if len(ids) == data.prompt_tokens]
    if not whole:
        raise UsageError(f"{text.source} has fewer than {data.prompt_tokens} tokens to begin with; give a longer text")
    prompts = torch.stack([whole[number % len(whole)] for number in range(count)])
    new = loop.length - data.prompt_tokens
    made = complete(teacher, prompts, new_tokens=new, temperature=data.sampling_temperature, seed=seed)
    return [str(teacher.tokenizer.decode(ids.tolist(), skip_special_tokens=True)) for ids in made]
