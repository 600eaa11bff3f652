"""Codes of few bits, trained: 2 bits against the best without training, and ternary from a pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training_bench import Bench

from fettle.methods.train import Qat

SCHEME = {"bits": 2, "group_size": 32, "asymmetric": True}


def codes(bench: Bench) -> None:
    """2 bits: what `--codes` names (methods, or folders of codes made before), and each of them trained on."""
    a = bench.arguments
    for start in a.codes.split(","):
        made = Path(start) if Path(start).is_dir() else bench.compressed(start, {"method": start, **SCHEME})
        bench.tell(f"{made.name}, 2 bits", made)
        fields = bench.fields(learning_rate=a.rate, scale_rate=a.scale_rate, rate_in=a.rate_in)
        healed, told = bench.trained(f"{made.name}-qat", Qat(**fields), made)
        bench.tell(f"{made.name}, 2 bits, then qat", healed, rate=a.rate, **told)


def ternary(bench: Bench) -> None:
    """Ternary from the pretrained model: the given number of steps, and what half and a quarter of them reach."""
    a = bench.arguments
    bench.tell("original", a.model)
    scheme: dict[str, Any] = {"grid": "ternary", "granularity": a.ternary}
    scheme["group_size"] = 32 if a.ternary == "group" else None
    for part in (4, 2, 1):
        steps = max(1, a.steps // part)
        fields = bench.fields(steps=steps, learning_rate=a.rate, scale_rate=a.scale_rate, rate_in=a.rate_in)
        made, told = bench.trained(f"ternary-{a.ternary}-{steps}", Qat(**fields, **scheme), a.model)
        bench.tell(f"ternary, {a.ternary}, {steps} steps", made, rate=a.rate, **told)
