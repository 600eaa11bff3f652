"""Measure an adapter that is not merged: its base with it beside a reference, both whole in memory.

An adapter has no file of the model's own shape that could be streamed, so both models are loaded (a base of codes stays
packed), and windows go through one after the other. Figures are those of `streaming.py`; bytes and parameters count
base and adapter.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fettle.data.windows import Windows
from fettle.errors import NonFiniteError, UsageError
from fettle.evaluate.memory import peak_memory_bytes, restart_peak
from fettle.evaluate.quality import concatenate, measure_tokens
from fettle.evaluate.result import Evaluation
from fettle.evaluate.size import measure_size
from fettle.evaluate.streaming import language_figures, library_versions
from fettle.methods.train.adapters import load_adapters
from fettle.methods.train.outputs import Observed, base_tree
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel, load
from fettle.progress import Progress, Silent

WEIGHTS = "adapter_model.safetensors"


def evaluate_adapter(
    base: Path, adapter: Path, reference: Path, windows: Windows, *, device: str = "cpu", generic: bool = False,
    progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Measures `base` with `adapter`.

    Args:
        base: the folder that the adapter was trained on.
        adapter: its folder.
        reference: the folder that KL is taken to; the base, or what that was made from.
        windows: what both read, int64 [tokens] each.
        device: torch's word for it.
        generic: for a family without an anatomy table.
        progress: told of every window.

    Raises:
        UsageError: no windows, or a model that predicts no next token.
        CheckpointError: the adapter belongs to another base.
        NonFiniteError: logits that are NaN or infinite.
    """
    if not windows.ids:
        raise UsageError("there are no windows of text to measure; give a longer text")
    started = time.monotonic()
    restart_peak()
    plain = load(base, device=device, generic=generic)
    if not plain.anatomy.causal or plain.anatomy.head is None:
        raise UsageError(f"{base} predicts no next token, and an adapter is measured by that; leave evaluation out")
    adapted = dataclasses.replace(plain, model=load_adapters(plain, {"measured": adapter}).to(device))
    original = load(reference, device=device, generic=generic)
    ours, theirs = _seen(adapted), _seen(original)
    found = []
    with (progress or Silent()).task("evaluating", len(windows.ids)) as task:
        for ids in windows.ids:
            found.append(measure_tokens(_logits(ours, ids, adapter), ids[1:], _logits(theirs, ids, reference)))
            task.advance()
    measures = concatenate(found)
    checkpoint, other = Checkpoint.open(base), Checkpoint.open(reference)
    size, whole = measure_size(checkpoint, plain.anatomy), measure_size(other, original.anatomy)
    extra, numbers = _stored(adapter)
    return Evaluation(
        **language_figures(measures, windows, base),
        bytes=size.bytes + (adapter / WEIGHTS).stat().st_size,
        bits_per_weight=size.bits_per_weight,
        model_bits_per_weight=8 * (size.tensor_bytes + extra) / (size.parameters + numbers),
        parameters=size.parameters + numbers,
        reference_bytes=whole.bytes,
        reference_model_bits_per_weight=whole.model_bits_per_weight,
        tokens=len(measures.loss),
        text_source=windows.source,
        text_sha256=windows.sha256,
        text_note=windows.note,
        window_tokens=max(len(ids) for ids in windows.ids),
        model_hashes=checkpoint.file_hashes(),
        reference_hashes=other.file_hashes(),
        versions=library_versions(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _seen(loaded: LoadedModel) -> Observed:
    return Observed(loaded.model, base_tree(loaded), loaded.anatomy, ())


@torch.inference_mode()
def _logits(model: Observed, ids: Tensor, folder: Path) -> Tensor:
    """float32 [tokens - 1, vocab], on the CPU."""
    device = next(model.model.parameters()).device
    found = model(ids.unsqueeze(0).to(device)).logits[0, :-1].float().cpu()
    if not torch.isfinite(found).all():
        raise NonFiniteError(f"{folder} gives NaN or infinity; it is damaged, or the model cannot compute this text")
    return found


def _stored(adapter: Path) -> tuple[int, int]:
    """Bytes and numbers of an adapter's tensors."""
    held = load_file(adapter / WEIGHTS).values()
    return sum(t.numel() * t.element_size() for t in held), sum(t.numel() for t in held)
