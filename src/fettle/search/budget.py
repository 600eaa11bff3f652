"""What a compression may cost: bits a weight or bytes of the whole model, and what may be chosen from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fettle.diagnose.candidates import Candidate, as_candidates, default_methods
from fettle.errors import UsageError, unknown_word
from fettle.methods.protocols import MatrixMethod

Fused = Literal["together", "free"]
BUDGET_BITS = (2, 3, 4, 5, 6, 8)
_UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How small the model has to be: give one of the first two.

    Attributes:
        bits_per_weight: everything stored for the compressed linears, in bits, by their weights.
        size_bytes: all weights' files of the written model.
        candidates: what a linear may get: methods, texts such as "gptq bits=3 group_size=64", or a recipe's steps;
            empty: gptq with 2, 3, 4, 5, 6 and 8 bits, groups of 32 with zero points.
        fused: whether linears that runtimes fuse (query, key and value; gate and up) share a scheme.
    """

    bits_per_weight: float | None = None
    size_bytes: int | None = None
    candidates: Sequence[MatrixMethod | str | Mapping[str, Any]] = ()
    fused: Fused = "together"

    def validate(self) -> None:
        """Checks what can be checked without a model.

        Raises:
            UsageError: none or both of the limits, one that cannot be, or an unknown word.
        """
        if (self.bits_per_weight is None) == (self.size_bytes is None):
            raise UsageError("a budget is either bits per weight or a size; give one of the two, such as 3.5 bits")
        limit = self.size_bytes if self.bits_per_weight is None else self.bits_per_weight
        assert limit is not None
        if not (math.isfinite(limit) and limit > 0):
            raise UsageError(f"the budget is {limit}; it must be above 0, such as 3.5 bits per weight or 2GB")
        if self.fused not in get_args(Fused):
            raise UsageError(unknown_word("choice for fused linears", str(self.fused), get_args(Fused)))

    def chosen_from(self, dtype: str) -> list[Candidate]:
        """The candidates with their labels, for a model of this type."""
        return as_candidates(self.candidates or default_methods(("gptq",), BUDGET_BITS), dtype)

    def title(self) -> str:
        """What is asked, for people and as part of a recipe's name: "3.5bit" or "2000000bytes"."""
        return f"{self.bits_per_weight:g}bit" if self.bits_per_weight is not None else f"{self.size_bytes}bytes"


def parse_size(text: str) -> int:
    """Bytes that a text such as 2GB, 750 MB or 1.5GiB means.

    Raises:
        UsageError: no number with one of the units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = next((u for u in _UNITS if match is not None and u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        allowed = ", ".join(u for u in _UNITS if u)
        raise UsageError(f"size {text!r} is no number of bytes; write a number and one of {allowed}, such as 2GB")
    return int(float(match[1]) * _UNITS[unit])
