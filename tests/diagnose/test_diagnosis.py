"""A whole diagnosis of the tiny model: figures that hang together, the same on any number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fettle
from fettle.diagnose.candidates import as_candidates, parse_candidate
from fettle.errors import RecipeError, UsageError
from fettle.report.diagnosis import render_diagnosis
from tests.diagnose.conftest import CANDIDATES, FEW

LINEARS = 14  # 2 blocks of 7


def stable(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in ("seconds", "peak_memory_bytes")}


def test_every_linear_and_candidate_is_measured(diagnosis: dict[str, Any]) -> None:
    assert len(diagnosis["effects"]) == LINEARS * len(CANDIDATES)
    assert all(effect["kl"] > 0 and effect["kl_estimate"] > 0 for effect in diagnosis["effects"])
    assert diagnosis["measured_linears"] == len(diagnosis["linears"]) == LINEARS


def test_estimates_rank_as_the_measurement_does(diagnosis: dict[str, Any]) -> None:
    assert diagnosis["correlation"]["kl_estimate"]["all"] > 0.8
    assert diagnosis["correlation"]["gram_estimate"]["all"] > 0
    assert all(rank > 0.3 for rank in diagnosis["correlation"]["kl_estimate"]["by_candidate"].values())


def test_fewer_bits_cost_more_everywhere(diagnosis: dict[str, Any]) -> None:
    by = {(e["linear"], e["candidate"]): e for e in diagnosis["effects"]}
    for linear in diagnosis["linears"]:
        coarse, fine = by[linear["name"], "gptq-2bit"], by[linear["name"], "gptq-4bit"]
        assert coarse["kl"] > fine["kl"]
        assert coarse["output_snr_db"] < fine["output_snr_db"]
        assert coarse["bits_per_weight"] < fine["bits_per_weight"]


def test_depth_begins_alike_and_ends_in_the_kl(diagnosis: dict[str, Any]) -> None:
    for depth in diagnosis["depth"]:
        assert depth["original_inputs"][0] == depth["compressed_inputs"][0]
        assert depth["kl"] > max(e["kl"] for e in diagnosis["effects"] if e["candidate"] == depth["candidate"]) / 3


def test_the_words_name_what_costs_most(diagnosis: dict[str, Any]) -> None:
    middle = sorted(diagnosis["depth"], key=lambda d: d["kl"])[1]["candidate"]
    worst = max((e for e in diagnosis["effects"] if e["candidate"] == middle), key=lambda e: e["kl"])
    assert f"Keep high: {worst['linear']}" in diagnosis["words"]


def test_a_sample_measures_some_and_estimates_all_on_any_threads(
    tiny_llama: Path, text_file: Path, diagnosis: dict[str, Any]
) -> None:
    options = {"candidates": CANDIDATES, "sample": 4, "text": text_file, "calibration": text_file, **FEW}
    one, two = (fettle.diagnose(tiny_llama, threads=threads, **options) for threads in (1, 2))
    assert stable(one) == stable(two)
    assert len({e["linear"] for e in one["effects"] if e["kl"] is not None}) == 4
    whole = {(e["linear"], e["candidate"]): e for e in diagnosis["effects"]}
    for effect in one["effects"]:
        same = whole[effect["linear"], effect["candidate"]]
        assert effect["kl_estimate"] == same["kl_estimate"]
        assert effect["kl"] in (None, same["kl"])


def test_the_page_tells_it_and_asks_nothing(diagnosis: dict[str, Any]) -> None:
    evil = "</script><script>alert(1)</script>"
    page = render_diagnosis({**diagnosis, "model": evil})
    assert "Keep high" in page and "gptq-2bit" in page
    assert page.count("<svg") == 7
    assert "<script" not in page and "<link" not in page and "url(" not in page
    with pytest.raises(UsageError, match="not whole"):
        render_diagnosis({"model": "m"})


def test_candidates_have_short_unique_labels() -> None:
    texts = ["gptq bits=4", "gptq bits=4 group_size=64", "gptq bits=3", "round_to_nearest bits=4 group-size=none"]
    assert [c.label for c in as_candidates(texts, "bfloat16")] == [
        "gptq-4bit group_size=32", "gptq-4bit group_size=64", "gptq-3bit", "round_to_nearest-4bit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("gtpq", "did you mean 'gptq'"),
        ("gptq bits", "FIELD=VALUE"),
        ("gptq bits=99", "bits=99"),
        ('gptq bits="3', "No closing quotation"),
        ("gptq bits=[3", "no value"),
    ],
)
def test_impossible_candidates_are_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_candidate(text)


@pytest.mark.parametrize("options", [{"sample": 0}, {"draws": 0}, {"candidates": ["gptq", "gptq"]}, {"device": "tpu"}])
def test_impossible_options_are_refused(tiny_llama: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        fettle.diagnose(tiny_llama, **options)


def test_a_compressed_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    made = fettle.compress(tiny_llama, tmp_path / "out", "round-to-nearest-4bit", evaluate=False)
    with pytest.raises(UsageError, match="compressed already"):
        fettle.diagnose(made.folder)
