"""The page of a speed measurement, from plain data."""

from __future__ import annotations

from typing import Any

import pytest

from fettle.errors import UsageError
from fettle.report.speed import render_speed

FOUND: dict[str, Any] = {
    "model": "a<b",
    "engine": "torch",
    "device": "cpu",
    "threads": 2,
    "repetitions": 5,
    "command_line": "fettle bench 'a<b'",
    "prefill_tokens_per_second": 100.0,
    "time_to_first_token_seconds": 0.25,
    "read_bytes_per_second": 30e9,
    "float32_operations_per_second": 200e9,
    "decode_tokens_per_second": {1: 10.0, 8: 50.0},
    "memory_bandwidth_share": 0.5,
    "arithmetic_share": 0.25,
    "spread": {
        "prefill_tokens_per_second": 0.01,
        "time_to_first_token_seconds": 0.02,
        "read_bytes_per_second": 0.03,
        "float32_operations_per_second": 0.04,
        "decode_tokens_per_second": {1: 0.05, 8: 0.06},
    },
}


def test_the_page_says_every_figure_and_escapes_names() -> None:
    page = render_speed(FOUND)
    for words in ("250 ms", "30 GB/s", "50 tokens/s", "6%", "One sequence uses 50%", "a prompt 25%", "a&lt;b"):
        assert words in page
    assert page.count("<svg") == 2
    assert "a<b" not in page


def test_a_share_that_was_not_measured_is_left_out() -> None:
    page = render_speed({**FOUND, "memory_bandwidth_share": None})
    assert "One sequence" not in page and "A prompt 25%" in page


def test_half_a_measurement_is_refused() -> None:
    with pytest.raises(UsageError, match="not whole"):
        render_speed({key: value for key, value in FOUND.items() if key != "spread"})
