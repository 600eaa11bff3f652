"""The recipe keys of the data mix: which share of the windows each source gives, and in which order the text comes.

    text           the rest                                              text_mix.py
    replay         a second text, against forgetting                     text_mix.py
    written        written by the teacher (sequence-level distillation)  written.py
    on_policy      written by the student as it is now                   on_policy.py
    adversarial    where student and teacher differ most now             adversarial.py

`written` and `replay` are shares of the windows that are drawn before the first step; `on_policy` and `adversarial` are
shares of every step, taken from what the other sources would have given there, and anew every `refresh_every` steps.
`curriculum` orders all windows by difficulty (`curriculum.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fettle.errors import RecipeError
from fettle.methods.train.options import LoopFields, SignalFields

Judge = Literal["none", "teacher", "original"]
Pacing = Literal["root", "linear"]


@dataclass(frozen=True, kw_only=True)
class DataFields:
    """Shares of the sources, and the order of the windows."""

    on_policy: float = field(
        default=0.0,
        metadata={"help": "share of each step that the student writes itself (GKD)", "minimum": 0.0, "maximum": 1.0},
    )
    written: float = field(
        default=0.0,
        metadata={
            "help": "share of the windows that the teacher writes (sequence-level)", "minimum": 0.0, "maximum": 1.0,
        },
    )  # fmt: skip
    adversarial: float = field(
        default=0.0,
        metadata={
            "help": "share of each step drawn where student and teacher differ most", "minimum": 0.0, "maximum": 1.0,
        },
    )  # fmt: skip
    prompt_tokens: int = field(
        default=16, metadata={"help": "tokens of a window of text that a written one begins with", "minimum": 2}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "at which is written; 0 takes the likeliest", "minimum": 0.0, "maximum": 100.0}
    )
    refresh_every: int = field(
        default=20, metadata={"help": "steps between two drawings of on_policy and adversarial", "minimum": 1}
    )
    candidates: int = field(
        default=4, metadata={"help": "windows that are looked at for each adversarial one", "minimum": 2}
    )
    curriculum: Judge = field(
        default="none", metadata={"help": "easy windows first, by the loss of the teacher or of the original"}
    )
    pacing: Pacing = field(
        default="root", metadata={"help": "how the share of windows in use grows; root adds most at first"}
    )
    pace: float = field(
        default=0.5,
        metadata={"help": "share of the steps after which all windows are in use", "minimum": 0.0, "maximum": 1.0},
    )

    def check_data(self, loop: LoopFields, signals: SignalFields) -> None:
        """Checks that the mix and the other fields fit together.

        Raises:
            RecipeError: shares above one, prompts as long as windows, or a source without what it needs.
        """
        if self.on_policy + self.adversarial > 1:
            raise RecipeError(
                f"on_policy={self.on_policy:g} and adversarial={self.adversarial:g} are shares of the same step; "
                "allowed: a sum of at most 1"
            )
        if self.curriculum != "none" and loop.minutes is not None:
            raise RecipeError(
                f"curriculum={self.curriculum} grows with the share of the steps, and minutes={loop.minutes:g} do not "
                "say how many there will be; allowed with it: steps or tokens"
            )
        given = self.written + (loop.replay_share if loop.replay is not None else 0.0)
        if given > 1:
            raise RecipeError(f"written and replay_share come to {given:g}; allowed: a sum of at most 1")
        if (self.on_policy or self.written) and self.prompt_tokens >= loop.length:
            raise RecipeError(
                f"prompt_tokens={self.prompt_tokens} leaves nothing to write in windows of length={loop.length}; "
                f"allowed: 2 to {loop.length - 1}"
            )
        for name in ("on_policy", "adversarial"):
            if getattr(self, name) and not signals.needs_teacher:
                raise RecipeError(
                    f"{name} needs a teacher to learn from, and only hard has a weight; set soft to more than 0"
                )
        if self.on_policy and signals.teacher_top_k is not None:
            raise RecipeError(
                "teacher_top_k keeps answers to windows that are known before the first step, and on_policy makes new "
                "ones; leave one out"
            )
