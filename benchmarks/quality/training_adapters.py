"""Adapters on a new domain: what share of full fine-tuning's gain how few parameters reach, and what they cost.

Every contender has its step sizes; of these, and of the looks on the way, what counts is the one with the least loss on
the held-back text, full fine-tuning's too. The judging text chooses nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training_bench import Bench, next_tokens, say, times_slower

import fettle
from fettle.methods.train import Adapter, Distill
from fettle.methods.train.adapters import load_adapters
from fettle.models.checkpoint import Checkpoint
from fettle.models.source import resolve

MOST = "query,value,output,mlp"  # all roles but the key's: on the embedded model rank 1 is then 0.47%
WITH_HEAD = {"targets": "all,head", "rank": 20, "alpha": 20.0, "ranks": "head=90"}  # cores of 20² and 90²: 0.48%
# fields, and the step sizes to choose from where --adapter-rates gives none
KINDS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "prompt, 2 tokens": ({"kind": "prompt", "virtual_tokens": 2}, (0.03, 0.1, 0.3)),
    "prompt, 16 tokens": ({"kind": "prompt", "virtual_tokens": 16}, (0.03, 0.1, 0.3)),
    "prefix, 4 tokens": ({"kind": "prefix", "virtual_tokens": 4}, (0.03, 0.1, 0.3)),
    "ia3": ({"kind": "ia3"}, (0.01, 0.03, 0.1)),
    "bottleneck, width 8": ({"kind": "bottleneck", "rank": 8}, (0.003, 0.01, 0.03)),
    "lora, rank 1, mlp": ({"rank": 1, "alpha": 2.0, "targets": "mlp"}, (0.02,)),
    "lora, rank 2, attention": ({"rank": 2, "alpha": 4.0, "targets": "attention"}, (0.02,)),
    "lora, rank 1, all but keys": ({"rank": 1, "alpha": 2.0, "targets": MOST}, (0.01, 0.02, 0.04)),
    "dora, rank 1, mlp": ({"kind": "dora", "rank": 1, "alpha": 2.0, "targets": "mlp"}, (0.02,)),
    "lora_sb, blocks and head": ({"kind": "lora_sb", **WITH_HEAD}, (0.015, 0.03, 0.06)),
    "lora_xs, blocks and head": ({"kind": "lora_xs", **WITH_HEAD}, (0.02,)),
    "lora, rank 3, all": ({"rank": 3, "alpha": 6.0}, (0.01,)),
    "lora, rank 8, all": ({"rank": 8}, (0.005,)),
    "rslora, rank 8, all": ({"kind": "rslora", "rank": 8, "alpha": 8.0}, (0.005,)),
}


def adapters(bench: Bench) -> None:
    """Full fine-tuning, then every kind in `--kinds`, for the same windows; gains in nats a token of the new domain."""
    a = bench.arguments
    windows = bench.windows(a.domain_judge)
    base = resolve(a.model)
    before = Checkpoint.open(base).file_hashes()
    start, _ = next_tokens(fettle.load(a.model).model, windows)
    shared = _domain(bench)
    say(name="before", perplexity=math.exp(start), domain=Path(a.domain).parent.name, **_told(shared))
    tried = [(rate, Distill(**shared, hard=1.0, soft=0.0, learning_rate=rate)) for rate in _numbers(a.full_rates)]
    rate, made, told = _best(bench, "full", tried)
    full, _ = next_tokens(fettle.load(made).model, windows)
    say(name="full fine-tuning", rate=rate, perplexity=math.exp(full), **told)
    for name in a.kinds.split("+") if a.kinds else KINDS:
        fields, rates = KINDS[name]
        tried = [
            (rate, Adapter(**{**shared, **fields}, learning_rate=rate))
            for rate in (_numbers(a.adapter_rates) if a.adapter_rates else rates)
        ]
        _one(bench, name, tried, windows, gain_of=(start, full))
    say(name="base", untouched=Checkpoint.open(base).file_hashes() == before)


def _domain(bench: Bench) -> dict[str, Any]:
    """The loop's fields on the new domain: its first `--domain-tokens` tokens, where so few are asked for."""
    a = bench.arguments
    fields = bench.fields(domain=True, held_back_text=a.domain_dev, look_every=max(1, a.steps // 4))
    if a.domain_dev:
        fields["held_back"] = 16
    if a.domain_tokens is None:
        return fields
    text = Path(a.domain).read_text(encoding="utf-8")[: 8 * a.domain_tokens]
    tokenizer = fettle.load(a.model).tokenizer
    kept = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: a.domain_tokens]
    path = bench.folder / f"{Path(a.domain).parent.name}-{a.domain_tokens}.txt"
    path.write_text(tokenizer.decode(kept, clean_up_tokenization_spaces=False), encoding="utf-8")
    return {**fields, "text": str(path)}


def _best(bench: Bench, name: str, tried: Iterable[tuple[float, Any]]) -> tuple[float, Path, dict[str, Any]]:
    """Trains with every step size; the one with the least held-back loss at its best look."""
    a = bench.arguments
    where = f"{Path(a.domain).parent.name}-{a.domain_tokens or 'all'}-{a.steps}"
    found = []
    for rate, method in tried:
        made, told = bench.trained(f"{where}-{name} {rate:g}", method, a.model)
        found.append((min(told["held_back"]), rate, made, told))
        if len(found) > 1:
            say(name=name, tried=rate, held_back=found[-1][0])
    _, rate, made, told = min(found, key=lambda each: each[:2])
    return rate, made, told


def _one(bench: Bench, name: str, tried: Any, windows: Any, gain_of: tuple[float, float]) -> None:
    rate, made, told = _best(bench, name, tried)
    plain, loaded = fettle.load(bench.arguments.model), fettle.load(bench.arguments.model)
    adapted = load_adapters(loaded, {"one": made})
    loss, _ = next_tokens(adapted, windows)
    slower = times_slower({"plain": plain.model, "adapted": adapted}, int(plain.model.config.vocab_size))
    record = json.loads((Path(made) / "fettle_adapter.json").read_text(encoding="utf-8"))
    every = sum(p.numel() for p in plain.model.parameters())
    start, full = gain_of
    say(
        name=name, rate=rate, perplexity=math.exp(loss), share_of_gain=(start - loss) / (start - full),
        trainable=record["parameters"] / every, bytes=record["bytes"], times_slower=slower["adapted"], **told,
    )  # fmt: skip


def _numbers(words: str) -> list[float]:
    return [float(word) for word in words.split(",")]


def _told(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in ("steps", "batch_windows", "length")}
