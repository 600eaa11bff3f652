"""The library in five calls: `load`, `compress`, `train`, `evaluate`, `generate`; the three that look first: `plan`,
`inspect`, `diagnose`; and `open_engine`, which serves many requests at once.

import fettle

result = fettle.compress("demo", "demo-4bit", "gptq-4bit")
print(result.evaluation.kl_mean, fettle.generate("demo-4bit", "def add(a, b):"))
"""

from __future__ import annotations

from fettle.api.compressing import Compression, compress
from fettle.api.questions import diagnose, evaluate, evaluate_cache, generate, inspect, load, plan
from fettle.api.training import Training, train
from fettle.engine.asynchronous import AsyncEngine
from fettle.engine.engine import Completion, Engine, Update
from fettle.engine.runners import RunnerOptions, open_engine
from fettle.engine.sampler import Sampling
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.search.budget import Budget
from fettle.tensors.cache_codes import CacheScheme

__all__ = [
    "AsyncEngine",
    "Budget",
    "CacheScheme",
    "Completion",
    "Compression",
    "Engine",
    "Request",
    "RunnerOptions",
    "Sampling",
    "SchedulerOptions",
    "Training",
    "Update",
    "compress",
    "diagnose",
    "evaluate",
    "evaluate_cache",
    "generate",
    "inspect",
    "load",
    "open_engine",
    "plan",
    "train",
]
