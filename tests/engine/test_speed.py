"""What is counted as read for every token, against the model's own parameters; and the arithmetic of the shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from fettle.engine.speed import Measured, shares, weights_read
from fettle.engine.speed_options import SpeedOptions
from fettle.errors import UsageError
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load


def test_the_table_of_an_embedding_is_not_read(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    read_bytes, weights = weights_read(checkpoint, read_anatomy(checkpoint))
    parameters = dict(load(tiny_llama).model.named_parameters())
    needed = {name: p for name, p in parameters.items() if name != "model.embed_tokens.weight"}
    assert read_bytes == sum(2 * p.numel() for p in needed.values())  # bf16 files
    assert weights == sum(p.numel() for p in needed.values() if p.ndim == 2)


def test_shares_are_of_medians() -> None:
    def of(*values: float) -> Measured:
        return Measured.of(values)

    found = {
        "decode_tokens_per_second": {1: of(10.0, 20.0, 60.0)},
        "prefill_tokens_per_second": of(100.0),
        "read_bytes_per_second": of(4000.0),
        "float32_operations_per_second": of(1e6),
    }
    assert shares(found, 100, 1000) == {"memory_bandwidth_share": 0.5, "arithmetic_share": 0.2}
    assert shares({**found, "decode_tokens_per_second": {4: of(1.0)}}, 100, 1000)["memory_bandwidth_share"] is None
    assert shares({**found, "integer_operations_per_second": of(2e6)}, 100, 1000)["arithmetic_share"] == 0.1
    assert of(10.0, 20.0, 60.0) == Measured(median=20.0, spread=2.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"batches": ()}, "batches is empty"),
        ({"repetitions": 0}, "repetitions is 0"),
    ],
)
def test_options_that_measure_nothing_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SpeedOptions(**fields).check()


def test_the_cache_holds_what_is_measured() -> None:
    options = SpeedOptions(prompt_tokens=100, new_tokens=7, batches=(1, 3))
    assert options.cache_tokens >= max(101, 3 * (16 + 7))
