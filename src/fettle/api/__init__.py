"""The library in five calls: `load`, `compress`, `train`, `evaluate`, `generate`; and the three that look first:
`plan`, `inspect`, `diagnose`.

import fettle

result = fettle.compress("demo", "demo-4bit", "gptq-4bit")
print(result.evaluation.kl_mean, fettle.generate("demo-4bit", "def add(a, b):"))
"""

from __future__ import annotations

from fettle.api.compressing import Compression, compress
from fettle.api.questions import diagnose, evaluate, evaluate_cache, generate, inspect, load, plan
from fettle.api.training import Training, train
from fettle.search.budget import Budget
from fettle.tensors.cache_codes import CacheScheme

__all__ = [
    "Budget",
    "CacheScheme",
    "Compression",
    "Training",
    "compress",
    "diagnose",
    "evaluate",
    "evaluate_cache",
    "generate",
    "inspect",
    "load",
    "plan",
    "train",
]
