"""Adapters on a new domain: what share of full fine-tuning's gain how few parameters reach, and what they cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from training_bench import Bench, next_tokens, say, times_slower

import fettle
from fettle.methods.train import Adapter, Distill
from fettle.methods.train.adapters import load_adapters
from fettle.models.checkpoint import Checkpoint
from fettle.models.source import resolve

MOST = "query,value,output,mlp"  # all roles but the key's: on the embedded model rank 1 is then 0.48%
KINDS: dict[str, dict[str, Any]] = {
    "prompt, 2 tokens": {"kind": "prompt", "virtual_tokens": 2, "learning_rate": 0.1},
    "prompt, 16 tokens": {"kind": "prompt", "virtual_tokens": 16, "learning_rate": 0.1},
    "ia3": {"kind": "ia3", "learning_rate": 0.03},
    "lora, rank 1, mlp": {"rank": 1, "alpha": 2.0, "targets": "mlp", "learning_rate": 0.02},
    "lora, rank 2, attention": {"rank": 2, "alpha": 4.0, "targets": "attention", "learning_rate": 0.02},
    "lora, rank 1, all but keys": {"rank": 1, "alpha": 2.0, "targets": MOST, "learning_rate": 0.02},
    "dora, rank 1, mlp": {"kind": "dora", "rank": 1, "alpha": 2.0, "targets": "mlp", "learning_rate": 0.02},
    "lora, rank 3, all": {"rank": 3, "alpha": 6.0, "learning_rate": 0.01},
    "lora, rank 8, all": {"rank": 8, "learning_rate": 0.005},
    "rslora, rank 8, all": {"kind": "rslora", "rank": 8, "alpha": 8.0, "learning_rate": 0.005},
}


def adapters(bench: Bench) -> None:
    """Full fine-tuning, then every kind in `--kinds`, for the same windows; gains in nats a token of the new domain."""
    a = bench.arguments
    windows = bench.windows(a.domain_judge)
    base = resolve(a.model)
    before = Checkpoint.open(base).file_hashes()
    start, _ = next_tokens(fettle.load(a.model).model, windows)
    say(name="before", perplexity=math.exp(start))
    full = math.inf
    for rate in (float(x) for x in a.full_rates.split(",")):
        method = Distill(**bench.fields(domain=True, hard=1.0, soft=0.0, learning_rate=rate))
        made, told = bench.trained(f"full-{rate:g}", method, a.model)
        loss, _ = next_tokens(fettle.load(made).model, windows)
        full = min(full, loss)
        say(name="full fine-tuning", rate=rate, perplexity=math.exp(loss), **told)
    for name in a.kinds.split("+") if a.kinds else KINDS:
        fields = {**KINDS[name], **({"learning_rate": a.adapter_rate} if a.adapter_rate else {})}
        _one(bench, name, fields, windows, gain_of=(start, full))
    say(name="base", untouched=Checkpoint.open(base).file_hashes() == before)


def _one(bench: Bench, name: str, fields: dict[str, Any], windows: Any, gain_of: tuple[float, float]) -> None:
    method = Adapter(**bench.fields(domain=True, **fields))
    made, told = bench.trained(f"{name} {fields['learning_rate']:g}", method, bench.arguments.model)
    plain, loaded = fettle.load(bench.arguments.model), fettle.load(bench.arguments.model)
    adapted = load_adapters(loaded, {"one": made})
    loss, _ = next_tokens(adapted, windows)
    slower = times_slower({"plain": plain.model, "adapted": adapted}, int(plain.model.config.vocab_size))
    record = json.loads((Path(made) / "fettle_adapter.json").read_text(encoding="utf-8"))
    every = sum(p.numel() for p in plain.model.parameters())
    start, full = gain_of
    say(
        name=name, rate=fields["learning_rate"], perplexity=math.exp(loss),
        share_of_gain=(start - loss) / (start - full), trainable=record["parameters"] / every, bytes=record["bytes"],
        times_slower=slower["adapted"], **told,
    )  # fmt: skip
