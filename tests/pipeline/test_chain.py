"""Chains: parsed, refused, run stage by stage, resumed, and told as plain data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import fettle
from fettle.api import training as api_training
from fettle.errors import InterruptedRunError, RecipeError, ResumeError, UsageError
from fettle.methods.train import training
from fettle.models.checkpoint import Checkpoint
from fettle.pipeline.chain import Chain, chain_from_method, load_chain, parse_chain
from fettle.pipeline.recipe import parse_recipe

SMALL = {
    "steps": 2, "windows": 8, "length": 32, "batch_windows": 4, "look_every": 2, "checkpoint_every": 1000,
    "held_back": 2,
}  # fmt: skip
CODES = {"steps": [{"method": "round_to_nearest", "bits": 2, "group_size": 16}]}


def chain(text: Path, *stages: dict[str, Any]) -> Chain:
    told = [stage if "compress" in stage else {**SMALL, "text": str(text), **stage} for stage in stages]
    return parse_chain({"name": "mine", "stages": told}, "test")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        ({"steps": []}, "a recipe of steps is for fettle compress"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [{"train": "distil"}]}, "did you mean 'distill'"),
        ({"stages": [{"train": "distill", "step": 3}]}, "stage 1: unknown field of the method distill 'step'"),
        ({"stages": [{"method": "gptq"}]}, "the key 'train' or 'compress'"),
        ({"stages": [{"compress": "gptq-4bit"}]}, "no stage trains"),
        ({"stages": [{"compress": "gptq-4bit", "bits": 3}]}, "nothing stands beside it"),
        ({"stages": [{"train": "adapter"}, {"compress": "gptq-4bit"}]}, "set merge: true"),
        ({"stages": [{"train": "distill"}], "storage": "x"}, "unknown key of a chain"),
    ],
)
def test_an_impossible_chain_is_refused(mapping: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_chain(mapping, "test")


def test_a_chain_is_no_recipe_and_says_so() -> None:
    with pytest.raises(RecipeError, match="run it with: fettle train --recipe"):
        parse_recipe({"stages": [{"train": "distill"}]}, "test")
    with pytest.raises(RecipeError, match="did you mean 'ternary'"):
        load_chain("ternery")


def test_a_chain_equals_what_it_writes(text_file: Path) -> None:
    made = chain(text_file, {"compress": CODES}, {"train": "qat", "learning_rate": 1e-4})
    assert parse_chain(made.to_dict(), "test") == made
    assert chain_from_method("distill", {"steps": 3}).stages[0].method.steps == 3  # type: ignore[union-attr]


def test_stages_follow_each_other_and_are_measured_on_the_files(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    made = fettle.train(tiny_llama, tmp_path / "out", chain(text_file, {"compress": CODES}, {"train": "qat"}))
    stages = tmp_path / "out.run" / "stages"
    assert {p.name for p in stages.iterdir()} >= {"01-compress", "01-compress.json", "02-qat.json", "02-qat.run"}
    assert not (stages / "02-qat.run" / "checkpoints").exists()
    assert made.evaluation is not None
    assert made.evaluation.kl_mean is not None
    told = json.loads((tmp_path / "out.run" / "training.json").read_text())
    assert [line["stage"] for line in told["stages"]] == ["compress", "qat"]
    assert len(told["stages"][1]["curve"]["losses"]) == 2
    page = made.report_path.read_text()
    assert "How it was trained" in page
    assert "02-qat: loss over 2 steps" in page
    measured = fettle.evaluate(tmp_path / "out", reference=tiny_llama, max_tokens=512)
    assert measured.bits_per_weight == pytest.approx(made.evaluation.bits_per_weight)


def test_codes_behind_a_training_state_their_loss_against_what_was_trained(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    stages = chain(text_file, {"train": "distill", "hard": 1.0, "learning_rate": 1e-2}, {"compress": CODES})
    made = fettle.train(tiny_llama, tmp_path / "out", stages)
    trained = tmp_path / "out.run" / "stages" / "01-distill"
    alone = fettle.evaluate(tmp_path / "out", reference=trained, length=512, max_tokens=1024)
    line = made.summary["stages"][1]
    assert "against_input" not in made.summary["stages"][0]
    lost = line["against_input"]
    assert (lost["kl_mean"], lost["perplexity"]) == (alone.kl_mean, alone.perplexity)
    assert made.evaluation is not None
    assert lost["kl_mean"] != made.evaluation.kl_mean  # that is against what the chain began with
    assert json.loads((trained.parent / "02-compress.json").read_text())["against_input"] == lost
    page = made.report_path.read_text()
    assert "02-compress: KL to what it read, mean</th>" in page
    assert f"{lost['kl_mean']:.5f} nats" in page


def test_a_chain_is_judged_by_the_text_that_is_given(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.txt", tmp_path / "out"
    mine.write_text("A cat sat on a mat and saw a rat.\n" * 60, encoding="utf-8")
    stages = chain(text_file, {"train": "distill"}, {"compress": CODES})
    with pytest.raises(UsageError, match="judge by a text that no stage sees"):
        fettle.train(tiny_llama, out, stages, judge=text_file)
    assert not out.exists()
    first = fettle.train(tiny_llama, out, stages)
    made = fettle.train(tiny_llama, out, stages, judge=mine)  # all is done; the measurement is another
    told = hashlib.sha256(mine.read_bytes()).hexdigest()
    assert first.evaluation is not None
    assert made.evaluation is not None
    assert first.evaluation.text_sha256 != made.evaluation.text_sha256 == told
    assert made.summary["stages"][1]["against_input"]["text_sha256"] == told


def test_a_chain_stopped_in_its_last_stage_gives_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chain(text_file, {"train": "distill", "layers": 1}, {"compress": CODES}, {"train": "qat"})
    fettle.train(tiny_llama, tmp_path / "whole", made, evaluate=False)
    run = training.run

    def stop(objective: Any, text: Any, fields: Any, folder: Path, progress: Any, mix: Any = None) -> Any:
        if "qat" in folder.name:
            raise InterruptedRunError("stopped here")
        return run(objective, text, fields, folder, progress, mix)

    monkeypatch.setattr(training, "run", stop)
    with pytest.raises(InterruptedRunError):
        fettle.train(tiny_llama, tmp_path / "torn", made, evaluate=False)
    monkeypatch.setattr(training, "run", run)
    first = tmp_path / "torn.run" / "stages" / "01-distill.json"
    before = first.stat().st_mtime_ns
    found = fettle.train(tiny_llama, tmp_path / "torn", made)
    assert first.stat().st_mtime_ns == before  # a stage that is done is not run again
    assert digests(tmp_path / "torn") == digests(tmp_path / "whole")
    assert found.evaluation is not None  # a student of one block against two
    assert found.evaluation.kl_mean is not None


def test_a_chain_that_trims_the_vocabulary_is_measured_in_bits_a_byte(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text("the quick brown fox\n" * 200, encoding="utf-8")
    recipe = {
        "name": "trim", "calibration": {"text": str(text), "windows": 2, "length": 32},
        "steps": [{"method": "trim_vocabulary"}],
    }  # fmt: skip
    made = fettle.train(tiny_llama, tmp_path / "out", chain(text, {"train": "distill"}, {"compress": recipe}))
    assert made.evaluation is not None
    assert made.evaluation.kl_mean is None
    alone = fettle.evaluate(tiny_llama, max_tokens=made.evaluation.tokens)
    assert made.evaluation.reference_bits_per_byte is not None
    assert made.evaluation.bits_per_byte is not None
    assert alone.bits_per_byte == pytest.approx(made.evaluation.reference_bits_per_byte, rel=0.05)
    assert made.evaluation.bits_per_byte != made.evaluation.reference_bits_per_byte


def test_a_stage_whose_files_were_damaged_since_is_run_again(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out", chain(text_file, {"train": "distill"})
    fettle.train(tiny_llama, out, made, evaluate=False)
    before, shard = digests(out), next(out.glob("model-00001-*"))
    told = tmp_path / "out.run" / "stages" / "01-distill.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    told.write_text(told.read_text()[:9])  # nor is this one believed
    fettle.train(tiny_llama, out, made, evaluate=False)
    assert digests(out) == before
    assert json.loads(told.read_text())["stage"] == "distill"


def test_texts_that_changed_places_are_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    lines = text_file.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[:500]))
    second.write_text("".join(lines[500:]))
    made = chain(first, {"train": "distill", "replay": str(second)})
    checkpoint = Checkpoint.open(tiny_llama)
    before = api_training._identity(made, checkpoint, "cpu", False)
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    after = api_training._identity(made, checkpoint, "cpu", False)
    assert [key for key in before if before[key] != after[key]] == ["texts"]


def test_another_chain_is_refused_in_the_same_place(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fettle.train(tiny_llama, out, chain(text_file, {"train": "distill"}), evaluate=False)
    with pytest.raises(ResumeError, match="chain"):
        fettle.train(tiny_llama, out, chain(text_file, {"train": "distill", "seed": 1}), evaluate=False)
    fettle.train(tiny_llama, out, chain(text_file, {"train": "distill", "seed": 1}), evaluate=False, fresh=True)
    with pytest.raises(UsageError, match="no training wrote there"):
        fettle.compress(tiny_llama, tmp_path / "other", "round-to-nearest-4bit", evaluate=False)
        fettle.train(tiny_llama, tmp_path / "other", chain(text_file, {"train": "distill"}), evaluate=False)
    with pytest.raises(UsageError, match="lies in the model's own folder"):
        fettle.train(tiny_llama, tiny_llama / "out", chain(text_file, {"train": "distill"}), evaluate=False)
    with pytest.raises(UsageError, match="context holds 512 tokens"):
        fettle.train(tiny_llama, tmp_path / "long", chain(text_file, {"train": "distill", "length": 513}))
    for threads in (0, 10**12):
        with pytest.raises(UsageError, match=r"threads=1?0+ cannot be; allowed: 1 to 1024"):
            fettle.train(tiny_llama, tmp_path / "long", chain(text_file, {"train": "distill"}), threads=threads)
    virtual = {"train": "adapter", "kind": "prompt", "length": 500, "virtual_tokens": 13}
    with pytest.raises(UsageError, match=r"virtual_tokens=513; this model's context holds 512 tokens"):
        fettle.train(tiny_llama, tmp_path / "long", chain(text_file, virtual))
