"""The recipe keys that every training method shares: how long, how fast, on which text, and what is learned from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fettle.errors import RecipeError
from fettle.methods.train.layer_maps import LayerMap
from fettle.methods.train.signals import Divergence

Weighting = Literal["fixed", "loss", "agreement"]
Scope = Literal["sample", "task"]

USUAL_STEPS = 100
BEFORE = "before"  # in place of a teacher's name: the model that the stage starts from, an assistant in a chain
MOST_STEPS, MOST_PLACES = 10_000_000, 1_000_000_000  # the order of windows is a list in memory
SIGNALS = ("hard", "soft", "logits", "features", "attention", "relations", "distances", "values", "sentences")


@dataclass(frozen=True, kw_only=True)
class LoopFields:
    """How long and how fast, and on which text."""

    steps: int | None = field(
        default=None,
        metadata={
            "help": f"steps of the optimizer; none: {USUAL_STEPS}, unless tokens or minutes are given",
            "minimum": 1, "maximum": MOST_STEPS,
        },
    )  # fmt: skip
    tokens: int | None = field(
        default=None, metadata={"help": "training tokens instead of steps, rounded up to a whole step", "minimum": 1}
    )
    minutes: float | None = field(
        default=None,
        metadata={"help": "minutes instead of steps; the step size follows the clock, and no two runs are alike"},
    )
    batch_windows: int = field(default=8, metadata={"help": "windows a step, over all processes", "minimum": 1})
    accumulate: int = field(default=1, metadata={"help": "parts that a step's windows are taken in", "minimum": 1})
    learning_rate: float = field(
        default=3e-4, metadata={"help": "largest step size of AdamW", "minimum": 0.0, "maximum": 10.0}
    )
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "how the step size falls to zero"}
    )
    warmup: float = field(
        default=0.05,
        metadata={"help": "share of the steps or minutes in which it rises", "minimum": 0.0, "maximum": 1.0},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "keep a block's inputs alone and run it again for its gradients: less memory"}
    )
    shard: bool = field(
        default=False,
        metadata={"help": "each process of several holds a part of the model, gradients and moments alone (FSDP)"},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW", "minimum": 0.0, "maximum": 10.0})
    precision: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "of products; weights and sums stay float32"}
    )
    seed: int = field(
        default=0, metadata={"help": "of windows, their order and all chance", "minimum": 0, "maximum": 2**31}
    )
    windows: int = field(default=256, metadata={"help": "windows of training text to draw from", "minimum": 1})
    length: int = field(default=256, metadata={"help": "tokens a window", "minimum": 4})
    text: str | None = field(default=None, metadata={"help": "UTF-8 training text; none for the embedded one"})
    replay: str | None = field(
        default=None, metadata={"help": "a second text, mixed in against forgetting the first domain"}
    )
    replay_share: float = field(
        default=0.25, metadata={"help": "share of the windows from it", "minimum": 0.0, "maximum": 1.0}
    )
    held_back: int = field(
        default=8, metadata={"help": "windows from the end of the text that no step sees; 0 for none", "minimum": 0}
    )
    held_back_text: str | None = field(
        default=None, metadata={"help": "UTF-8 text to hold back instead, from its beginning; steps see all of text"}
    )
    look_every: int = field(default=20, metadata={"help": "steps between looks at the windows held back", "minimum": 1})
    patience: int = field(default=5, metadata={"help": "looks without a gain before it stops", "minimum": 1})
    keep: Literal["best", "last"] = field(
        default="best", metadata={"help": "the weights with the least held-back loss, the start included, or the last"}
    )
    checkpoint_every: int = field(default=50, metadata={"help": "steps between checkpoints", "minimum": 1})

    def check_loop(self) -> None:
        """Checks what the fields' own bounds cannot say.

        Raises:
            RecipeError: several limits, parts of a step that do not divide it, minutes that are none, more than can be
                listed.
        """
        limits = {name: getattr(self, name) for name in ("steps", "tokens", "minutes")}
        given = [name for name, limit in limits.items() if limit is not None]
        if len(given) > 1:
            raise RecipeError(
                f"{', '.join(f'{name}={limits[name]}' for name in given)}: one limit ends a run and its schedule; "
                f"leave out all but one of {', '.join(given)}"
            )
        if self.batch_windows % self.accumulate:
            raise RecipeError(
                f"accumulate={self.accumulate} does not divide batch_windows={self.batch_windows}; allowed: a divisor"
            )
        if self.held_back_text is not None and (self.held_back == 0 or self.held_back_text == self.text):
            raise RecipeError(
                f"held_back_text={self.held_back_text} with held_back={self.held_back} and text={self.text}: no step "
                "sees it; allowed: another text than text, and held_back of at least 1"
            )
        places = self.planned_steps * self.batch_windows
        if self.minutes is None and (self.planned_steps > MOST_STEPS or places > MOST_PLACES):
            asked = f"tokens={self.tokens} with length={self.length}" if self.tokens else f"steps={self.planned_steps}"
            raise RecipeError(
                f"{asked} and batch_windows={self.batch_windows} are {self.planned_steps} steps that read {places} "
                f"windows; allowed: at most {MOST_STEPS} steps and {MOST_PLACES} windows. Train less, or in parts"
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise RecipeError(f"minutes={self.minutes} cannot be; allowed: numbers above 0, or none for another limit")

    @property
    def planned_steps(self) -> int:
        """Steps of the schedule; by minutes more than they can hold."""
        if self.minutes is not None:
            return MOST_STEPS
        if self.tokens is None:
            return self.steps or USUAL_STEPS
        return max(1, -(-self.tokens // (self.batch_windows * self.length)))


@dataclass(frozen=True, kw_only=True)
class SignalFields:
    """What is learned from: a weight for each signal of `signals.py`, and the teacher."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "folder, hub id, demo, or base+adapter; several with commas; before: what the stage reads; none: "
            "what the chain began with"
        },
    )
    teacher_weights: str | None = field(
        default=None, metadata={"help": "of several teachers' probabilities, with commas; none for alike"}
    )
    teacher_weighting: Weighting = field(
        default="fixed", metadata={"help": "several teachers' weights adapt to their loss, or to their agreement"}
    )
    weighting_by: Scope = field(
        default="sample", metadata={"help": "weights that adapt do so by window, or by the text it was drawn from"}
    )
    teacher_top_k: int | None = field(
        default=None, metadata={"help": "keep so many of the teacher's logits on disk, once a window", "minimum": 1}
    )
    hard: float = field(default=0.0, metadata={"help": "weight of the text's own next token", "minimum": 0.0})
    soft: float = field(default=1.0, metadata={"help": "weight of the teacher's probabilities", "minimum": 0.0})
    temperature: float = field(default=1.0, metadata={"help": "of the soft labels", "minimum": 0.01, "maximum": 1000.0})
    divergence: Divergence = field(default="forward", metadata={"help": "how soft labels are compared"})
    logits: float = field(default=0.0, metadata={"help": "weight of the raw logits", "minimum": 0.0})
    features: float = field(default=0.0, metadata={"help": "weight of the states after blocks", "minimum": 0.0})
    attention: float = field(default=0.0, metadata={"help": "weight of the attention maps", "minimum": 0.0})
    relations: float = field(default=0.0, metadata={"help": "weight of cosines between samples", "minimum": 0.0})
    distances: float = field(default=0.0, metadata={"help": "weight of distances between samples", "minimum": 0.0})
    values: float = field(default=0.0, metadata={"help": "weight of value relations in the last block", "minimum": 0.0})
    sentences: float = field(
        default=0.0,
        metadata={"help": "weight of an encoder's mean vectors; its default beside features", "minimum": 0.0},
    )
    layer_map: LayerMap = field(
        default="uniform",
        metadata={"help": "which of the teacher's layers a student's layer looks at; influence and loss are measured"},
    )

    def weights(self) -> dict[str, float]:
        """Signal → weight, of those that count."""
        return {name: getattr(self, name) for name in SIGNALS if getattr(self, name) > 0}

    def check_signals(self) -> None:
        """Checks that there is something to learn from.

        Raises:
            RecipeError: no signal, weights that are none, or kept logits for signals that need a live teacher.
        """
        asked = self.weights()
        if not asked:
            raise RecipeError(
                f"every signal has the weight 0, so there is nothing to learn from; set one of {', '.join(SIGNALS)}"
            )
        count = len(self.teachers())
        if self.teacher_weights is not None and len(self.parsed_teacher_weights()) != max(count, 1):
            raise RecipeError(
                f"teacher_weights={self.teacher_weights!r} for {count} teachers; give one positive number for each"
            )
        live = sorted(set(asked) - {"hard", "soft"})
        if self.teacher_top_k is not None and live:
            raise RecipeError(
                f"teacher_top_k keeps probabilities alone, and {', '.join(live)} need the teacher itself; leave one out"
            )
        if self.teacher_weighting != "fixed" and count < 2:
            raise RecipeError(
                f"teacher_weighting={self.teacher_weighting} weighs several teachers, and teacher names {count}; name "
                "them with commas, or leave it out"
            )
        if count > 1 and live:
            raise RecipeError(
                f"several teachers have one mean of probabilities, but no mean of {', '.join(live)}; use soft and hard"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether any signal but the text's own tokens counts."""
        return bool(set(self.weights()) - {"hard"})

    def teachers(self) -> list[str]:
        """The teachers that are named."""
        return [part.strip() for part in (self.teacher or "").split(",") if part.strip()]

    def parsed_teacher_weights(self) -> list[float]:
        """Shares that sum up to one.

        Raises:
            RecipeError: no positive numbers.
        """
        count = max(len(self.teachers()), 1)
        if self.teacher_weights is None:
            return [1 / count] * count
        try:
            found = [float(part) for part in self.teacher_weights.split(",")]
        except ValueError:
            found = []
        if not found or not all(math.isfinite(weight) and weight > 0 for weight in found):
            raise RecipeError(
                f"teacher_weights={self.teacher_weights!r}; allowed: positive numbers with commas, as 2,1"
            )
        return [weight / sum(found) for weight in found]
