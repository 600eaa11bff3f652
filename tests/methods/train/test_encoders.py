"""Encoders: padding counts for nothing, the vectors are transformers' own, and a shallower student comes nearer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fettle
from fettle.errors import RecipeError, UsageError
from fettle.methods.train import Distill
from fettle.methods.train.encoders import encoder_signals
from fettle.methods.train.job import TrainJob
from fettle.methods.train.options import LoopFields
from fettle.methods.train.sentence_text import sentences
from fettle.methods.train.signals import pooled, sentence_error, value_relations_error
from fettle.methods.train.training import train
from fettle.models.loading import load
from fettle.pipeline.chain import chain_from_method

SMALL: dict[str, Any] = {
    "steps": 12, "windows": 64, "length": 24, "batch_windows": 8, "held_back": 4, "look_every": 6,
    "learning_rate": 2e-3, "checkpoint_every": 6,
}  # fmt: skip


def run(model: Path, text: Path, output: Path, **fields: Any) -> list[float]:
    method = Distill(**{**SMALL, "text": str(text), **fields})
    method.validate()
    job = TrainJob(model=model, original=model, output=output, folder=output.parent / f"{output.name}.run")
    return [loss for _, loss in train(method, job).held_back]


def test_a_teacher_of_the_other_kind_is_refused(
    tiny_bert: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Both have the same tokens, so nothing else would tell."""
    with pytest.raises(UsageError, match="is an encoder and the student a decoder"):
        run(tiny_llama, text_file, tmp_path / "out", teacher=str(tiny_bert))
    with pytest.raises(UsageError, match="is a decoder and the student an encoder"):
        run(tiny_bert, text_file, tmp_path / "out", teacher=str(tiny_llama))


def test_a_student_of_half_the_blocks_comes_nearer_to_its_teacher(
    tiny_bert: Path, text_file: Path, tmp_path: Path
) -> None:
    looks = run(tiny_bert, text_file, tmp_path / "out", layers=2)
    assert min(looks) < 0.9 * looks[0]
    from transformers import AutoModel, AutoTokenizer

    student = AutoModel.from_pretrained(str(tmp_path / "out"))
    assert student.config.num_hidden_layers == 2
    teacher, tokenizer = load(tiny_bert).model, AutoTokenizer.from_pretrained(str(tiny_bert))
    lines = [line for line in text_file.read_text().splitlines() if line.strip()][-4:]
    fed = tokenizer(lines, padding=True, truncation=True, max_length=24, return_tensors="pt")
    vectors, mask = [], fed["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        for model in (student, teacher):
            states = model(**{k: fed[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True)
            vectors.append((states.last_hidden_state * mask).sum(1) / mask.sum(1))
    error = float(sentence_error(*vectors))
    assert 0 < error < min(looks)  # one of the two parts of the loss on the same lines


def test_what_an_encoder_learned_from_is_told(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    """`soft` is a default of decoders; whoever gives it reads that it was not learned from."""
    made = fettle.train(
        tiny_bert, tmp_path / "out", chain_from_method("distill", {**SMALL, "steps": 1, "soft": 1.0,
        "text": str(text_file)}), evaluate=False,
    )  # fmt: skip
    expected = {"sentences": 1.0, "features": 1.0}
    assert json.loads((tmp_path / "out" / "fettle.json").read_text())["training"]["signals"] == expected
    assert made.summary["stages"][0]["signals"] == expected


def test_parts_of_a_step_of_sentences_add_up_to_the_step(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    """Lines of unequal length weigh alike, whichever others are padded with them."""
    how = {"layers": 2, "sentences": 1.0, "features": 1.0, "values": 1.0, "steps": 2, "look_every": 1}
    looks = [run(tiny_bert, text_file, tmp_path / str(parts), accumulate=parts, **how) for parts in (1, 4)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-4)


def test_too_few_sentences_are_refused(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"distances compares samples.*accumulate=4 are 2 windows with 1 samples"):
        run(tiny_bert, text_file, tmp_path / "a", distances=1.0, accumulate=4)


def test_other_signals_of_encoders_run_and_resume(tiny_bert: Path, text_file: Path, tmp_path: Path) -> None:
    how = {"layers": 2, "relations": 1.0, "distances": 0.5, "values": 1.0, "steps": 6}
    looks = run(tiny_bert, text_file, tmp_path / "out", **how)
    assert looks[-1] < looks[0]
    assert run(tiny_bert, text_file, tmp_path / "out", **how) == looks  # from the checkpoint of the last step


@pytest.mark.exhaustive
def test_an_encoder_loses_weights_while_it_learns_and_is_measured(
    tiny_bert: Path, text_file: Path, tmp_path: Path
) -> None:
    fields = {**SMALL, "steps": 4, "mask_every": 2, "score": "taylor", "text": str(text_file)}
    made = fettle.train(tiny_bert, tmp_path / "out", chain_from_method("sparse", fields))
    assert made.evaluation is not None
    assert made.evaluation.perplexity is None
    model = load(tmp_path / "out", dense=True).model
    for block in model.encoder.layer:
        for linear in (block.attention.self.query, block.output.dense):
            assert float((linear.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(UsageError, match="adapters here are a decoder's"):
        fettle.train(tiny_bert, tmp_path / "adapter", chain_from_method("adapter", {"length": 24}))


def test_what_is_padding_changes_no_relation() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    wide = [torch.cat([states, torch.randn(1, 3, 8, generator=generator)], 1) for states in (student, teacher)]
    mask = torch.tensor([[True] * 5 + [False] * 3])
    assert torch.allclose(value_relations_error(*wide, 2, mask), value_relations_error(student, teacher, 2), atol=1e-6)
    assert torch.allclose(pooled(wide[0], mask), student.mean(1), atol=1e-6)


def test_lines_are_windows_and_the_last_are_held_back(tiny_bert: Path, text_file: Path) -> None:
    tokenizer = load(tiny_bert).tokenizer
    found = sentences(tokenizer, LoopFields(text=str(text_file), windows=30, length=24, held_back=3))
    lines = [line.strip() for line in text_file.read_text().splitlines() if line.strip()]
    told = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.ids]
    assert found.learned == 30
    assert len(found.ids) == 33
    assert all(any(line.startswith(words.strip()) for line in lines[-30:]) for words in told[30:])
    named = [{words for words in part if words.startswith("def")} for part in (told[:30], told[30:])]  # these differ
    assert named[0]
    assert named[1]
    assert not named[0] & named[1]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hard": 1.0}, "not taught hard"),
        ({"soft": 0.5}, "not taught soft"),
        ({"attention": 1.0}, "not taught attention"),
        ({"teacher": "a,b"}, "an encoder has one teacher"),
    ],
)
def test_signals_of_next_tokens_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        encoder_signals(Distill(**fields))


def test_what_an_encoder_or_a_decoder_has_not_is_refused(
    tiny_bert: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="on_policy need next tokens"):
        run(tiny_bert, text_file, tmp_path / "a", on_policy=0.5)
    with pytest.raises(RecipeError, match="sentences compares an encoder's vectors"):
        run(tiny_llama, text_file, tmp_path / "b", sentences=1.0)
    empty = tmp_path / "short.txt"
    empty.write_text("one line\n")
    with pytest.raises(UsageError, match="a sentence a line"):
        run(tiny_bert, empty, tmp_path / "c")
