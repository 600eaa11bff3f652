"""The second-order estimate in every family: experts, fused and transposed projections, capped scores, tied heads."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fettle.data.windows import Windows
from fettle.diagnose.candidates import as_candidates
from fettle.diagnose.diagnosis import diagnose
from fettle.diagnose.original import Original
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.workers import Workers

from .conftest import Written
from .tiny_models import TINY, random_ids

CAUSAL = [name for name in TINY if "bert" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_estimates_rank_as_the_measurement_does(name: str, written: Written) -> None:
    folder, _ = written(name)
    checkpoint = Checkpoint.open(folder)
    ids = tuple(random_ids(24, seed=seed) for seed in range(4))
    sample = Windows(ids, 96, "random", hashlib.sha256(b"").hexdigest(), "")
    candidates = as_candidates(["round_to_nearest bits=3", "gptq bits=4"], "float32")
    with Workers(1) as workers, torch.no_grad():
        original = Original(checkpoint, read_anatomy(checkpoint), sample, device="cpu", workers=workers, draws=4)
        found = diagnose(original, sample, candidates)
    rank = found.correlation["kl_estimate"]["all"]
    assert rank is not None and rank > 0.7
    sums = [(depth.kl, depth.kl_estimate_sum) for depth in found.depth]
    assert all(0.2 < estimated / measured < 5 for measured, estimated in sums)
