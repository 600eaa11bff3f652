"""Codes of few bits, trained: 2 bits against the best without training; ternary from a pretrained model or scratch."""

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
    scheme = _ternary(a.ternary)
    for part in (4, 2, 1):
        steps = max(1, a.steps // part)
        fields = bench.fields(steps=steps, learning_rate=a.rate, scale_rate=a.scale_rate, rate_in=a.rate_in)
        made, told = bench.trained(f"ternary-{a.ternary}-{steps}", Qat(**fields, **scheme), a.model)
        bench.tell(f"ternary, {a.ternary}, {steps} steps", made, rate=a.rate, **told)


def scratch(bench: Bench) -> None:
    """Ternary from random weights of the model's shape, by the text alone, and by the original as well."""
    a = bench.arguments
    bench.tell("original", a.model)
    for name, soft in (("hard labels", 0.0), ("hard and soft labels", 1.0)):
        fields = bench.fields(learning_rate=a.rate, begin="random", hard=1.0, soft=soft)
        made, told = bench.trained(
            f"scratch-{a.ternary}-{name}-{a.steps}", Qat(**fields, **_ternary(a.ternary)), a.model
        )
        bench.tell(f"ternary from scratch, {a.ternary}, {name}", made, rate=a.rate, **told)


def _ternary(granularity: str) -> dict[str, Any]:
    return {"grid": "ternary", "granularity": granularity, "group_size": 32 if granularity == "group" else None}
