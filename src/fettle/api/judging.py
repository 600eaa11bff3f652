"""How a chain of trainings is judged: what it wrote against its beginning, codes against what they were made of.

A model is measured on its written files, an adapter beside its base. What stands behind a training and compresses
(after a merge, after healing) loses something that the last measurement, against the chain's beginning, mixes with what
training won; so its loss against its own input is stated as well, in the stage's line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import Text, evaluation_windows, read_text
from fettle.errors import UsageError
from fettle.evaluate.adapted import evaluate_adapter
from fettle.evaluate.apart import beside, same_tokens
from fettle.evaluate.result import Evaluation
from fettle.evaluate.streaming import evaluate
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length
from fettle.pipeline.chain import Chain
from fettle.progress import Progress

ADAPTER, INPUT = "adapter_config.json", "against_input"
TOLD = (
    "kl_mean", "top1_agreement", "perplexity", "reference_perplexity", "bits_per_byte", "reference_bits_per_byte",
    "tokens", "text_source", "text_sha256",
)  # fmt: skip


def judging_text(path: str | Path | None, chain: Chain) -> Text:
    """The text that a chain is measured on; without a path the embedded held-out one.

    Raises:
        UsageError: it cannot be read, or a stage learns from it.
    """
    text = read_text(path, variant="heldout")
    for stage in chain.stages:
        learned = [getattr(stage.method, name, None) for name in ("text", "replay")]
        if text.sha256 in {read_text(name).sha256 for name in learned if name is not None}:
            raise UsageError(f"the stage {stage.name} learns from {text.source}; judge by a text that no stage sees")
    return text


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who measures: on which text, how many tokens of it, where."""

    text: Text
    tokens: int
    device: str
    generic: bool
    progress: Progress

    def measure(self, model: Path, reference: Path, base: Path) -> Evaluation:
        """`model` against `reference`; `base` is what it is an adapter of, where it is one.

        A student may have fewer blocks than the reference, and one whose vocabulary was trimmed other tokens: then each
        is measured alone, and an adapter of such a base against the base.
        """
        if (model / ADAPTER).is_file():
            told = json.loads((model / ADAPTER).read_text(encoding="utf-8"))
            return evaluate_adapter(
                base, model, reference if same_tokens(base, reference, generic=self.generic) else base,
                self._windows(base, int(told.get("num_virtual_tokens") or 0)),
                device=self.device, generic=self.generic, progress=self.progress,
            )  # fmt: skip
        if same_tokens(model, reference, generic=self.generic):
            return self._alone(model, reference)
        return beside(self._alone(model, None), self._alone(reference, None))

    def _alone(self, model: Path, reference: Path | None) -> Evaluation:
        return evaluate(
            model, reference, self._windows(model), device=self.device, generic=self.generic, reshaped=True,
            progress=self.progress,
        )  # fmt: skip

    def _windows(self, model: Path, taken: int = 0) -> Any:
        """Windows that fit into the context beside `taken` virtual tokens."""
        length = min(512, (context_length(Checkpoint.open(model).config) or 512 + taken) - taken)
        return evaluation_windows(load_tokenizer(model), self.text, length=length, max_tokens=self.tokens)


def compresses_behind_training(chain: Chain, number: int) -> bool:
    """Whether a stage compresses what a stage before it trained."""
    return chain.stages[number].recipe is not None and any(x.method is not None for x in chain.stages[:number])


def loss_of_stage(judge: Judge, target: Path, source: Path) -> dict[str, Any]:
    """What a stage's folder lost against the one that it read; plain data."""
    found = judge.measure(target, source, source)
    return {key: getattr(found, key) for key in TOLD}


def is_judged(line: dict[str, Any], text: Text) -> bool:
    """Whether a stage's line holds its loss on this text already."""
    return bool((line.get(INPUT) or {}).get("text_sha256") == text.sha256)
