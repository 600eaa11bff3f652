"""The fields of methods whose sweep goes by the gram of a linear's inputs (`sweep.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SweepFields:
    """Recipe keys of the gram's factor and of what is made up for."""

    damping: float = field(
        default=0.01,
        metadata={"help": "added to the gram's diagonal, as a part of its mean", "minimum": 0.0, "maximum": 1.0},
    )
    correction: float = field(
        default=0.5,
        metadata={
            "help": "how much of earlier blocks' drift to make up for, where the walk measures it; 0 is the paper",
            "minimum": 0.0,
            "maximum": 1.0,
        },
    )

    def needs(self) -> tuple[str, ...]:
        """The gram; the drift where it is corrected."""
        return ("gram", "drift") if self.correction > 0 else ("gram",)
