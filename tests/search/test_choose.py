"""A budget from end to end on the tiny model: it is kept, measured, resumed, and the same on any number of threads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fettle
from fettle.data import windows as texts
from fettle.errors import InterruptedRunError, ResumeError, UsageError
from fettle.pipeline.recipe import Recipe, parse_recipe
from fettle.search import choose, sensitivities
from fettle.search.budget import Budget
from tests.pipeline.conftest import digests

CANDIDATES = ("gptq bits=2", "gptq bits=3", "gptq bits=4", "round_to_nearest bits=8")
BITS = 3.4


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Recipe:
    """Only its calibration counts."""
    options = {"windows": 6, "length": 32, "seed": 0, "text": str(text_file)}
    return parse_recipe({"calibration": options, "steps": [{"method": "round_to_nearest"}]}, "test")


@pytest.fixture(autouse=True, scope="module")
def few_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "SAMPLE_TOKENS", 256)
        yield


def compress(model: Path, out: Path, recipe: Recipe, **options: Any) -> Any:
    budget = options.pop("budget", Budget(bits_per_weight=BITS, candidates=CANDIDATES))
    return fettle.compress(model, out, recipe, budget=budget, **{"evaluate": False, **options})


@pytest.fixture(scope="module")
def undisturbed(
    tiny_llama: Path, calibration: Recipe, few_tokens: None, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A run on one thread that nobody stops; tests look at it and leave it as it is."""
    return compress(tiny_llama, tmp_path_factory.mktemp("undisturbed") / "out", calibration, threads=1)


def test_the_budget_is_kept_and_fused_linears_share(undisturbed: Any) -> None:
    made, folder = undisturbed, undisturbed.folder
    found = made.summary["budget"]
    assert 2.5 < found["bits_per_weight"] <= BITS
    assert found["predicted_kl"] > 0 and found["measured_kl"] > 0 and found["written_kl"] is None
    assert found["measured_kl"] == min(r["measured_kl"] for r in found["rounds"])
    mix = {name.removeprefix("model.layers.").replace("self_attn.", ""): label for name, label in found["mix"].items()}
    for block in (0, 1):
        assert len({mix[f"{block}.{part}_proj"] for part in "qkv"}) == 1
        assert len({mix[f"{block}.mlp.{part}_proj"] for part in ("gate", "up")}) == 1
    assert [step["where"] for step in made.summary["recipe"]["steps"]] == [{"name": name} for name in found["mix"]]
    assert not list((folder.parent / "out.run" / "search").glob("*.safetensors"))
    assert "KL on calibration text, predicted" in made.report_path.read_text(encoding="utf-8")


def test_a_size_is_kept_to_the_byte(tiny_llama: Path, tmp_path: Path, calibration: Recipe) -> None:
    limit = 160_000
    budget = Budget(size_bytes=limit, candidates=CANDIDATES, fused="free")
    made = compress(tiny_llama, tmp_path / "out", calibration, budget=budget)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert limit * 0.97 < written <= limit
    assert len(set(made.summary["budget"]["mix"].values())) > 1


def test_what_was_written_is_measured_beside_the_prediction(
    tiny_llama: Path, tmp_path: Path, calibration: Recipe, undisturbed: Any
) -> None:
    for name in ("out", "out.run"):
        shutil.copytree(undisturbed.folder.parent / name, tmp_path / name)
    made = compress(tiny_llama, tmp_path / "out", calibration, evaluate=True)
    assert made.resumed_whole
    found = made.summary["budget"]
    assert 0.1 < found["written_kl"] / found["measured_kl"] < 10


def test_only_calibration_text_is_looked_at(
    tiny_llama: Path, tmp_path: Path, calibration: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(texts.EMBEDDED, "heldout", "nowhere.txt")
    compress(tiny_llama, tmp_path / "out", calibration)


def test_threads_change_nothing(tiny_llama: Path, tmp_path: Path, calibration: Recipe, undisturbed: Any) -> None:
    made = compress(tiny_llama, tmp_path / "out", calibration, threads=2)
    assert made.summary["budget"] == undisturbed.summary["budget"]
    assert digests(tmp_path / "out") == digests(undisturbed.folder)


def test_a_killed_search_goes_on_where_it_stopped(
    tiny_llama: Path, tmp_path: Path, calibration: Recipe, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, kept = sensitivities._keep, []

    def once(original: Any, index: int, *rest: Any) -> Any:
        if kept:
            raise InterruptedRunError("stopped")
        kept.append(index)
        return keep(original, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sensitivities, "_keep", once)
        with pytest.raises(InterruptedRunError):
            compress(tiny_llama, tmp_path / "out", calibration)
    with monkeypatch.context() as patch:
        patch.setattr(sensitivities, "_keep", lambda o, index, *r: kept.append(index) or keep(o, index, *r))
        resumed = compress(tiny_llama, tmp_path / "out", calibration).summary["budget"]
    assert kept == [0, 1]
    assert resumed == undisturbed.summary["budget"]
    assert digests(tmp_path / "out") == digests(undisturbed.folder)


def test_a_killed_compression_keeps_its_recipe(
    tiny_llama: Path, tmp_path: Path, calibration: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise InterruptedRunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("fettle.api.compressing.write_model", stop)
        with pytest.raises(InterruptedRunError):
            compress(tiny_llama, tmp_path / "out", calibration)
    monkeypatch.setattr(choose, "_search", stop)
    made = compress(tiny_llama, tmp_path / "out", calibration)
    assert made.evaluation is None and (tmp_path / "out" / "fettle.json").is_file()
    assert compress(tiny_llama, tmp_path / "out", calibration).resumed_whole
    with pytest.raises(ResumeError, match="bits_per_weight"):
        compress(tiny_llama, tmp_path / "out", calibration, budget=Budget(bits_per_weight=4, candidates=CANDIDATES))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(bits_per_weight=1.5, candidates=CANDIDATES), "cannot be met"),
        (Budget(size_bytes=1000, candidates=CANDIDATES), "stays as it is"),
        (Budget(bits_per_weight=3, candidates=("gtpq",)), "did you mean"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, calibration: Recipe, budget: Budget, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        compress(tiny_llama, tmp_path / "out", calibration, budget=budget)
    assert not list(tmp_path.iterdir())


def test_an_output_of_others_is_refused(tiny_llama: Path, tmp_path: Path, calibration: Recipe) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="not empty"):
        compress(tiny_llama, tmp_path / "out", calibration)
