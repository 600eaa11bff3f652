"""Layer maps that are found by measuring: which blocks of a model a shallower student of it should be made of.

    influence   the blocks with the largest block influence, 1 - E cos(x[l], x[l+1])      one pass of text loss
    from all blocks, the one without which the text's loss is least goes, and so on   blocks²/2 passes a round

The scores are those that `drop_layers` uses (`methods/reshape/block_scores.py`, with their papers), on 16 windows of
the training text that is learned from. As a map for features and attention, layer i of the student looks at the state
that the next kept block of the teacher reads: it has to do the work of all blocks in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import calibration_windows
from fettle.errors import RecipeError, UsageError
from fettle.methods.reshape.block_scores import block_influence, losses_without
from fettle.methods.reshape.subject import Subject
from fettle.methods.train.layer_maps import SEARCHED, LayerMap, layer_map
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.sentence_text import sentences
from fettle.methods.train.text_mix import learning_part
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel
from fettle.workers import Workers

WINDOWS = 16


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Blocks by a map; `scores` says why: the influence of every block, or the loss after each that went."""

    map: LayerMap
    kept: list[int]
    blocks: int
    scores: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for `fettle.json` and the command line."""
        return {"map": self.map, "kept": self.kept, "blocks": self.blocks, "scores": [round(x, 6) for x in self.scores]}

    def looked_at(self) -> list[int]:
        """For each of the student's layers, the teacher's whose state it should have."""
        return [*(block - 1 for block in self.kept[1:]), self.blocks - 1] if self.map in SEARCHED else self.kept


def choose_blocks(
    chosen: LayerMap, layers: int, checkpoint: Checkpoint, anatomy: Anatomy, loop: LoopFields, device: str
) -> Chosen:
    """Which `layers` blocks of a model a student takes, or looks at.

    Raises:
        RecipeError: more layers than there are, or a loss of a model that predicts nothing.
    """
    blocks = len(anatomy.blocks)
    if chosen not in SEARCHED:
        return Chosen(map=chosen, kept=layer_map(chosen, layers, blocks), blocks=blocks)
    layer_map("uniform", layers, blocks)  # refuses what cannot be
    if chosen == "loss" and (not anatomy.causal or anatomy.head is None):
        raise RecipeError("a layer map by loss needs a model that predicts the next token; use influence")
    with Workers(1) as workers:
        windows = tuple(_windows(checkpoint, anatomy, loop))
        subject = Subject(checkpoint=checkpoint, anatomy=anatomy, windows=windows, workers=workers, device=device)
        if chosen == "influence":
            scores = block_influence(subject)
            kept = sorted(sorted(range(blocks), key=lambda i: (-scores[i], i))[:layers])
            return Chosen(map=chosen, kept=kept, blocks=blocks, scores=tuple(scores))
        gone: list[int] = []
        losses: list[float] = []
        for _ in range(blocks - layers):
            found = losses_without(subject, gone)
            gone = sorted([*gone, min(found, key=lambda i: (found[i], i))])
            losses.append(min(found.values()))
    return Chosen(map=chosen, kept=[i for i in range(blocks) if i not in gone], blocks=blocks, scores=tuple(losses))


def looked_at(signals: SignalFields, loop: LoopFields, depth: int, teacher: LoadedModel, device: str) -> list[int]:
    """For each of a student's `depth` layers, the teacher's that features and attention compare it with."""
    checkpoint = Checkpoint.open(teacher.folder)
    return choose_blocks(signals.layer_map, depth, checkpoint, teacher.anatomy, loop, device).looked_at()


def _windows(checkpoint: Checkpoint, anatomy: Anatomy, loop: LoopFields) -> Sequence[Tensor]:
    """int64 [tokens] each; lines for an encoder, without padding."""
    tokenizer = load_tokenizer(checkpoint.folder)
    if tokenizer is None:
        raise UsageError(f"{checkpoint.folder} has no tokenizer, and a layer map is searched on text; use uniform")
    if not anatomy.causal:
        found = sentences(tokenizer, loop)
        return [ids[ids != tokenizer.pad_token_id] for ids in found.ids[: min(4 * WINDOWS, found.learned)]]
    drawn = calibration_windows(tokenizer, learning_part(loop), windows=WINDOWS, length=loop.length, seed=loop.seed)
    return drawn.ids
