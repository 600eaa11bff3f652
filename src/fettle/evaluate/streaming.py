"""Measure the files of a model against the original's, one block of each in memory at a time.

The windows go through both models side by side:

    embed both → for each block: load it from both, run every window, compare, free → final norm and head, a window at
    a time: logits of both → `quality.measure_tokens`

So a model is measured on a machine that could not load it, the error is known after every block, and what counts is
what the files say, read as any loader reads them. The hidden states of all windows of both models are the price:
tokens · hidden · 4 bytes each. Windows are independent and run side by side; each sum has one order. Logits are made
for a part of a window at a time, so that a vocabulary of 150,000 entries costs 64 MB a model and thread, not 300.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import Windows
from fettle.errors import NonFiniteError, UsageError
from fettle.evaluate.basis import residual_basis
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.quality import TokenMeasures, concatenate, measure_tokens
from fettle.evaluate.result import Evaluation
from fettle.evaluate.size import measure_size
from fettle.evaluate.worst import kl_histogram, worst_tokens
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.skeleton import Skeleton
from fettle.progress import Progress, Silent
from fettle.tensors.orthogonal import Orthogonal
from fettle.workers import Workers

HEAD_LOGITS = 2**24  # logits made at once, of each model in each thread: 64 MB in float32


@dataclass(kw_only=True)
class _Side:
    """One of the two models on its way through the windows."""

    folder: Path
    checkpoint: Checkpoint
    anatomy: Anatomy
    skeleton: Skeleton
    hidden: list[Tensor]
    basis: Orthogonal | None  # the coordinates of its hidden states; None: those that it was trained in

    @classmethod
    def open(cls, folder: Path, device: str, generic: bool) -> _Side:
        checkpoint = Checkpoint.open(folder)
        checkpoint.verify_hashes()
        anatomy = read_anatomy(checkpoint, generic=generic)
        skeleton = Skeleton.build(checkpoint, anatomy, device=device)
        basis = residual_basis(checkpoint, anatomy)
        return cls(folder=folder, checkpoint=checkpoint, anatomy=anatomy, skeleton=skeleton, hidden=[], basis=basis)

    def embed(self, windows: Windows) -> None:
        self.hidden = [self.skeleton.embed(ids) for ids in windows.ids]
        self.skeleton.free_head()

    def run_block(self, index: int, workers: Workers) -> None:
        self.skeleton.load_block(index)
        self.hidden = workers.map(lambda hidden: self.skeleton.run_block(index, hidden), self.hidden)
        self.skeleton.free_block(index)
        for window, state in enumerate(self.hidden):
            if not torch.isfinite(state).all():
                raise NonFiniteError(
                    f"block {index} ({self.anatomy.blocks[index].name}) of {self.folder} turns window {window} into "
                    "NaN or infinity; the files are damaged, or the model cannot compute this text"
                )

    @property
    def states(self) -> list[Tensor]:
        """The hidden states in the coordinates that the model was trained in: what two models are compared by."""
        return self.hidden if self.basis is None else [self.basis.undo(state) for state in self.hidden]

    def logits(self, window: int, part: slice) -> Tensor:
        """float32 [part, vocab], on CPU; what follows position i of the window stands in row i."""
        found = self.skeleton.logits(self.hidden[window][:, part])[0].cpu()
        if not torch.isfinite(found).all():
            raise NonFiniteError(
                f"the head (final norm and vocabulary) of {self.folder} turns window {window} into NaN or infinity; "
                "the files are damaged, or the model cannot compute this text"
            )
        return found


def evaluate(
    model: Path,
    reference: Path | None,
    windows: Windows,
    *,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    reshaped: bool | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures the written files of `model`, against those of `reference` where one is given.

    Args:
        model: the folder to measure; its files are read as any loader reads them.
        reference: the original's folder; None: perplexity and size alone.
        windows: what both models read, int64 [tokens] each.
        device: where the blocks run.
        threads: windows worked on side by side; the result is the same, bit for bit, with any number.
        generic: for a family without an anatomy table.
        reshaped: whether the model may have other blocks and widths than the reference; None: as its fettle.json says.
        progress: told of every block.

    Raises:
        UsageError: no windows, or the two do not have the same blocks, vocabulary or width.
        ModelError: damaged files; activations that are not finite name their block.
    """
    if not windows.ids:
        raise UsageError("there are no windows of text to measure; give a longer text")
    started = time.monotonic()
    restart_peak()
    with Workers(threads) as workers, torch.no_grad():
        side = _Side.open(model, device, generic)
        other = _Side.open(reference, device, generic) if reference is not None else None
        if other is not None:
            if reshaped is None:
                reshaped = bool((side.checkpoint.record or {}).get("reshaped"))
            _require_alike(side, other, reshaped)
            other.embed(windows)
        side.embed(windows)
        errors = _through_blocks(side, other, workers, progress or Silent())
        measures = None
        if side.anatomy.causal and side.anatomy.head is not None:
            measures = _through_head(side, other, windows, workers)
        hashes = side.checkpoint.file_hashes(), other.checkpoint.file_hashes() if other is not None else {}
    fields = _sizes(side, other) | (language_figures(measures, windows, side.folder) if measures is not None else {})
    if other is not None:
        fields |= {"error_by_block": errors}
        if _same_width(side, other):
            fields |= _outputs(side, other)
    return Evaluation(
        **fields,
        tokens=len(measures.loss) if measures is not None else sum(len(ids) for ids in windows.ids),
        text_source=windows.source,
        text_sha256=windows.sha256,
        text_note=windows.note,
        window_tokens=max(len(ids) for ids in windows.ids),
        model_hashes=hashes[0],
        reference_hashes=hashes[1],
        versions=library_versions(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _require_alike(side: _Side, other: _Side, reshaped: bool) -> None:
    """Two models are compared only where each token of one has its counterpart in the other, and, unless the model was
    given another shape, each block and channel as well.
    """
    advice = f"{other.folder} is not what {side.folder} was made from; give the model that it was made from"
    blocks, reference_blocks = len(side.anatomy.blocks), len(other.anatomy.blocks)
    if blocks != reference_blocks and not reshaped:
        raise UsageError(f"the model has {blocks} blocks and the reference {reference_blocks}: {advice}")
    embedding, reference = side.anatomy.embedding, other.anatomy.embedding
    if embedding is not None and reference is not None:
        for what, mine, theirs in zip(("vocabulary", "width"), embedding.shape, reference.shape, strict=True):
            if mine != theirs and not (reshaped and what == "width"):
                raise UsageError(f"the model has a {what} of {mine} and the reference one of {theirs}: {advice}")
    words, reference_words = vocabulary(side.folder), vocabulary(other.folder)
    if words is not None and reference_words is not None and words != reference_words:
        raise UsageError(
            f"the tokenizers of the model and the reference have other vocabularies of the same size: {advice}"
        )


def vocabulary(folder: Path) -> Any:
    """The words of tokenizer.json with their ids; None where the folder has no such file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model", {}).get("vocab")
    except (ValueError, AttributeError):
        return None  # loading the tokenizer says what is wrong with it


def _through_blocks(side: _Side, other: _Side | None, workers: Workers, progress: Progress) -> list[float]:
    """Runs both through all blocks; relative error of the hidden states after each, where they pair."""
    errors = []
    blocks = len(side.anatomy.blocks)
    reference_blocks = 0 if other is None else len(other.anatomy.blocks)
    paired = other is not None and blocks == reference_blocks and _same_width(side, other)
    with progress.task("evaluating", max(blocks, reference_blocks)) as task:
        for index in range(max(blocks, reference_blocks)):
            if index < blocks:
                side.run_block(index, workers)
            if other is not None and index < reference_blocks:
                other.run_block(index, workers)
            if other is not None and paired:
                errors.append(relative_error(side.states, other.states))
            task.advance()
    return errors


def _same_width(side: _Side, other: _Side) -> bool:
    """Whether hidden states of one can be subtracted from the other's."""
    return side.hidden[0].shape == other.hidden[0].shape


def relative_error(hidden: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """‖h - h_ref‖ / ‖h_ref‖ over all windows, summed in float64."""
    difference = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(hidden, reference, strict=True))
    norm = sum(float(b.square().sum(dtype=torch.float64)) for b in reference)
    return math.sqrt(difference / norm) if norm else 0.0


def _through_head(side: _Side, other: _Side | None, windows: Windows, workers: Workers) -> TokenMeasures:
    side.skeleton.load_head()
    if other is not None:
        other.skeleton.load_head()

    vocabulary = side.anatomy.head.shape[0] if side.anatomy.head is not None else 1
    step = max(1, HEAD_LOGITS // vocabulary)

    def one(index: int) -> TokenMeasures:
        targets = windows.ids[index][1:]
        found = []
        for start in range(0, len(targets), step):
            part = slice(start, min(start + step, len(targets)))
            against = None if other is None else other.logits(index, part)
            found.append(measure_tokens(side.logits(index, part), targets[part], against))
        return concatenate(found)

    measured = concatenate(workers.map(one, range(len(windows.ids))))
    side.skeleton.free_head()
    if other is not None:
        other.skeleton.free_head()
    return measured


def language_figures(measures: TokenMeasures, windows: Windows, folder: Path) -> dict[str, Any]:
    """The fields of an `Evaluation` that follow from single tokens; `folder` has the tokenizer."""
    loss = measures.loss
    fields = _perplexity(loss, windows.text_bytes, "")
    if measures.kl is None or measures.reference_loss is None:
        return fields
    assert measures.agreement is not None and measures.probability_change is not None
    tokenizer = load_tokenizer(folder)
    return (
        fields
        | _perplexity(measures.reference_loss, windows.text_bytes, "reference_")
        | {
            "kl_mean": measures.kl.mean().item(),
            "kl_median": measures.kl.median().item(),
            "kl_p99": torch.sort(measures.kl).values[min(len(loss) - 1, math.ceil(0.99 * len(loss)) - 1)].item(),
            "kl_max": measures.kl.max().item(),
            "top1_agreement": measures.agreement.double().mean().item(),
            "probability_rms_change": measures.probability_change.square().mean().sqrt().item(),
            "kl_histogram": kl_histogram(measures.kl),
            "worst_tokens": worst_tokens(measures, windows, tokenizer),
        }
    )


def _perplexity(loss: Tensor, text_bytes: int, prefix: str) -> dict[str, float]:
    mean = loss.mean().item()
    deviation = loss.std().item() if len(loss) > 1 else 0.0
    perplexity = math.exp(min(mean, 700.0))  # a model of noise must not overflow the number
    found = {
        f"{prefix}perplexity": perplexity,
        f"{prefix}perplexity_standard_error": perplexity * deviation / math.sqrt(len(loss)),
    }
    if text_bytes:
        found[f"{prefix}bits_per_byte"] = loss.sum().item() / math.log(2) / text_bytes
    return found


def _outputs(side: _Side, other: _Side) -> dict[str, float]:
    ours, theirs = side.states, other.states
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=-1).flatten() for a, b in zip(ours, theirs, strict=True)]
    return {
        "output_relative_error": relative_error(ours, theirs),
        "output_cosine": torch.cat(cosines).double().mean().item(),
    }


def _sizes(side: _Side, other: _Side | None) -> dict[str, Any]:
    size = measure_size(side.checkpoint, side.anatomy)
    fields: dict[str, Any] = {
        "bytes": size.bytes,
        "bits_per_weight": size.bits_per_weight,
        "model_bits_per_weight": size.model_bits_per_weight,
        "parameters": size.parameters,
    }
    if other is not None:
        base = measure_size(other.checkpoint, other.anatomy)
        fields |= {"reference_bytes": base.bytes, "reference_model_bits_per_weight": base.model_bits_per_weight}
    return fields


def library_versions() -> dict[str, str]:
    """Of what an evaluation was made with."""
    import platform
    from importlib.metadata import version

    return {
        "fettle": version("fettle-llm"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
