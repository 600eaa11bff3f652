"""Trimming the vocabulary to the tokens that a text uses: rows of the embedding and of the head go, and the tokenizer's
files are rewritten to match.

Which stay: every token that the calibration text is cut into, all special and added ones, the byte alphabet (so any
text can still be written), and whatever their merges pass through (`trimmed_tokenizer.py`). So the text is cut exactly
as before, only with other numbers, and other text into more, shorter tokens.

In a small model the vocabulary is most of it: here a tied table of 4,096 rows is a fifth. It changes nothing inside of
the blocks; what is lost is the probability that went to the removed tokens. Embedding and head lose the same rows, tied
or not. Measured against the original by bits a byte, since the tokens are no longer the same.

After Ushio et al.: An Efficient Multilingual Language Model Compression through Vocabulary Trimming, 2023,
https://arxiv.org/abs/2305.15020. Cost: the text is cut once; no pass through the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fettle.errors import RecipeError
from fettle.methods.reshape.subject import Reshaped, Subject
from fettle.methods.reshape.trimmed_tokenizer import TRIMMED_FILES, kept_tokens, renumbered, trim_files
from fettle.models.reshaped_config import with_sizes
from fettle.models.view import Cut, Piece, View


@dataclass(frozen=True, kw_only=True)
class TrimVocabulary:
    """Keeps the tokens that the calibration text uses, and what their merges need."""

    name: ClassVar[str] = "trim_vocabulary"
    title: ClassVar[str] = "Trimming the vocabulary"
    source: ClassVar[str] = "after Ushio et al. 2023, https://arxiv.org/abs/2305.15020"
    statistics: ClassVar[tuple[str, ...]] = ("text",)
    objective: ClassVar[str] = "shape"

    def needs(self) -> tuple[str, ...]:
        """The whole text."""
        return self.statistics

    def validate(self) -> None:
        """There are no fields."""

    def label(self) -> str:
        """trim-vocabulary."""
        return "trim-vocabulary"

    def reshape(self, subject: Subject) -> Reshaped:
        """The model with fewer tokens, and its tokenizer."""
        _ = subject.family
        anatomy, base = subject.anatomy, subject.checkpoint
        if anatomy.embedding is None:
            raise RecipeError("trim_vocabulary: this model has no embedding that fettle can find; leave the step out")
        files = _tokenizer_files(subject)
        used = subject.used_tokens()
        kept = kept_tokens(files["tokenizer.json"], used, anatomy.embedding.shape[0])
        if len(kept) == anatomy.embedding.shape[0]:
            raise RecipeError("trim_vocabulary: the text uses every token, so nothing can go; leave the step out")
        rows = torch.tensor(kept)
        pieces: dict[str, Piece] = {name: Cut(name) for name in base.entries}
        tables = {x.weight_name for x in (anatomy.embedding, anatomy.head) if x is not None}
        tables |= {f"{x.name}.bias" for x in (anatomy.head,) if x is not None} & base.entries.keys()
        for name in tables:
            pieces[name] = Cut(name, rows=rows)
        new = {old: place for place, old in enumerate(kept)}
        trimmed = trim_files(files, new)
        config = with_sizes(renumbered(base.config, new), {"vocab": len(kept)})
        decided = {"method": self.name, "used": len(used), "kept": len(kept), "of": anatomy.embedding.shape[0]}
        return Reshaped(view=View.of(base, config, pieces, trimmed), decided=decided)


def _tokenizer_files(subject: Subject) -> dict[str, dict[str, Any]]:
    """The folder's JSON files that name tokens by number, as the last view has them."""
    replaced = subject.checkpoint.side_files
    found: dict[str, dict[str, Any]] = {}
    for name in TRIMMED_FILES:
        path = subject.checkpoint.folder / name
        if name in replaced or path.is_file():
            found[name] = json.loads(replaced[name] if name in replaced else path.read_text(encoding="utf-8"))
    if "tokenizer.json" not in found:
        raise RecipeError(
            "trim_vocabulary: the folder has no tokenizer.json, and only that file is rewritten; convert its tokenizer "
            "first (transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    return found
