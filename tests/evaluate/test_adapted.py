"""An adapter beside its base is measured as the merged model is; the base stays what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fettle
from fettle.methods.train.adapters import merge_adapter
from fettle.pipeline.chain import parse_chain

pytest.importorskip("peft")
SMALL: dict[str, Any] = {
    "train": "adapter", "steps": 3, "windows": 8, "length": 32, "batch_windows": 4, "held_back": 2, "hard": 1.0,
    "soft": 0.0, "learning_rate": 0.02, "keep": "last",
}  # fmt: skip
CODES = {"compress": {"steps": [{"method": "round_to_nearest", "bits": 4, "group_size": 16}]}}


def test_an_adapter_is_measured_as_its_merged_model_is(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    stages = parse_chain({"stages": [{**SMALL, "kind": "lora", "rank": 4, "text": str(text_file)}]}, "test")
    made = fettle.train(tiny_llama, tmp_path / "out", stages)
    merge_adapter(tiny_llama, tmp_path / "out", tmp_path / "merged")
    merged = fettle.evaluate(tmp_path / "merged", reference=tiny_llama, length=512, max_tokens=1024)
    found = made.evaluation
    assert found is not None
    assert merged.kl_mean is not None
    assert merged.kl_mean > 1e-4
    for name in ("kl_mean", "perplexity", "reference_perplexity", "bits_per_byte"):
        assert getattr(found, name) == pytest.approx(getattr(merged, name), rel=2e-3), name
    adapter = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert found.bytes == merged.reference_bytes + adapter  # type: ignore[operator]
    page = made.report_path.read_text()
    assert "The adapter of tiny-llama takes" in page
    assert "KL to the original, mean" in page


@pytest.mark.parametrize("kind", ["prompt", pytest.param("bottleneck", marks=pytest.mark.exhaustive)])
def test_what_cannot_be_merged_is_measured_against_the_models_beginning(
    kind: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    stages = parse_chain({"stages": [CODES, {**SMALL, "kind": kind, "text": str(text_file)}]}, "test")
    found = fettle.train(tiny_llama, tmp_path / "out", stages).evaluation
    assert found is not None
    assert found.window_tokens == (512 - 16 if kind == "prompt" else 512)  # virtual tokens take room of the context
    codes = tmp_path / "out.run" / "stages" / "01-compress"
    base = fettle.evaluate(codes, reference=tiny_llama, length=found.window_tokens, max_tokens=1024)
    assert found.reference_perplexity == pytest.approx(base.reference_perplexity, rel=1e-4)  # not the codes' own
    assert found.perplexity != pytest.approx(base.perplexity, rel=1e-4)
    assert found.tokens == base.tokens
