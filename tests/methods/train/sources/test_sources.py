"""Sources in whole trainings: the student's and the teacher's own words, and the same bytes after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.apart import run_apart

from fettle.api.completing import complete
from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import read_text
from fettle.errors import RecipeError, UsageError
from fettle.methods.registry import build
from fettle.methods.train import TRAIN_METHODS, Distill
from fettle.methods.train import curve as curve_module
from fettle.methods.train.curve import checkpoints
from fettle.methods.train.job import TrainJob
from fettle.methods.train.sources.gathering import window_losses
from fettle.methods.train.sources.written import written_text
from fettle.methods.train.training import train
from fettle.models.loading import load
from fettle.progress import Silent

HOW: dict[str, Any] = {
    "steps": 6, "windows": 12, "length": 32, "batch_windows": 4, "look_every": 3, "checkpoint_every": 2, "held_back": 2,
    "learning_rate": 3e-3, "layers": 1, "keep": "last", "hard": 0.5, "prompt_tokens": 6, "refresh_every": 3,
    "on_policy": 0.25, "adversarial": 0.25, "written": 0.5, "curriculum": "original",
}  # fmt: skip
PLAIN = {**HOW, "on_policy": 0.0, "adversarial": 0.0, "curriculum": "none", "steps": 1}


def job(model: Path, output: Path) -> TrainJob:
    folder = output.parent / f"{output.name}.run"
    return TrainJob(model=model, original=model, output=output, folder=folder, complete=complete)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def train_until_checkpoint_4(model: Path, text: Path, output: Path) -> None:
    """Trains; a kill comes before the mark of the checkpoint behind step 4."""
    write_json = curve_module.write_json

    def kill_at_the_mark(path: Path, content: Any) -> None:
        if path.parent.name == "checkpoint-4":
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, content)

    curve_module.write_json = kill_at_the_mark
    train(Distill(**HOW, text=str(text)), job(model, output))


def test_every_source_at_once_gives_the_same_bytes_after_a_kill(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Killed in the checkpoint behind step 4, it goes on from step 2, inside the first segment."""
    method = Distill(**HOW, text=str(text_file))
    curve = train(method, job(tiny_llama, tmp_path / "undisturbed"))
    ended = run_apart(train_until_checkpoint_4, tiny_llama, text_file, tmp_path / "killed", folder=tmp_path)
    assert ended.code == -signal.SIGKILL, ended.said
    run = tmp_path / "killed.run"
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    before = digests(run / "drawn")
    assert {"on_policy-00000000.safetensors", "adversarial-00000003.safetensors"} <= before.keys()
    again = train(method, job(tiny_llama, tmp_path / "killed"))
    assert again.losses == curve.losses
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")
    assert before.items() <= digests(run / "drawn").items()
    assert digests(run / "drawn") == digests(tmp_path / "undisturbed.run" / "drawn")


def test_on_policy_windows_are_the_students_own_words(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """At temperature 0 each is what transformers' own greedy generation gives for the same beginning."""
    fields = {**HOW, "steps": 1, "written": 0.0, "adversarial": 0.0, "curriculum": "none", "layers": None}
    train(Distill(**{**fields, "sampling_temperature": 0.0}, text=str(text_file)), job(tiny_llama, tmp_path / "out"))
    ids = load_file(tmp_path / "out.run" / "drawn" / "on_policy-00000000.safetensors")["ids"]
    assert ids.shape == (1, 32)
    model = load(tiny_llama).model
    greedy = model.generate(
        ids[:, :6],
        attention_mask=torch.ones(1, 6),
        max_new_tokens=26,
        min_new_tokens=26,
        do_sample=False,
        pad_token_id=1,
    )
    made = ids[0, : greedy.shape[1]]
    assert torch.equal(greedy[0], made) or 1 in made[6:]  # generate never gives the end token here, the source may


def test_written_text_is_the_teachers_and_is_kept(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    fields = {
        **HOW,
        "on_policy": 0.0,
        "adversarial": 0.0,
        "curriculum": "none",
        "steps": 1,
        "windows": 16,
        "written": 1.0,
    }
    output = tmp_path / "out"
    train(Distill(**fields, text=str(text_file)), job(tiny_llama, output))
    chunks = sorted((tmp_path / "out.run" / "written").glob("written-*.json"))
    texts = [text for chunk in chunks for text in json.loads(chunk.read_text())]
    assert len(chunks) == 2
    assert len(texts) == 16
    tokenizer, corpus = load_tokenizer(tiny_llama), text_file.read_text()
    beginning = tokenizer.decode(tokenizer(texts[0])["input_ids"][:3], skip_special_tokens=True)
    assert beginning.strip() in corpus
    assert texts[0] not in corpus
    before = chunks[1].read_bytes()
    chunks[1].unlink()
    for name in ("fettle.json", "config.json"):
        (output / name).unlink()
    train(Distill(**fields, text=str(text_file)), job(tiny_llama, output))
    assert chunks[1].read_bytes() == before


def test_a_teacher_with_another_tokenizer_may_write_but_not_be_compared(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    fields = {
        **HOW,
        "on_policy": 0.0,
        "adversarial": 0.0,
        "curriculum": "none",
        "steps": 1,
        "windows": 4,
        "teacher": "demo",
    }
    with pytest.raises(UsageError, match=r"different tokenizers.*written: 1, hard: 1, soft: 0"):
        train(Distill(**{**fields, "written": 0.0}, text=str(text_file)), job(tiny_llama, tmp_path / "refused"))
    made = {**fields, "written": 1.0, "hard": 1.0, "soft": 0.0}
    curve = train(Distill(**made, text=str(text_file)), job(tiny_llama, tmp_path / "out"))
    assert len(curve.losses) == 1
    assert (tmp_path / "out" / "fettle.json").is_file()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"on_policy": 0.6, "adversarial": 0.5}, "a sum of at most 1"),
        ({"written": 0.9, "replay": "x", "replay_share": 0.2}, "written and replay_share come to 1.1"),
        ({"on_policy": 0.5, "length": 16}, "prompt_tokens=16 leaves nothing to write"),
        ({"adversarial": 0.5, "soft": 0.0, "hard": 1.0}, "adversarial needs a teacher"),
        ({"on_policy": 0.5, "teacher_top_k": 4}, "teacher_top_k keeps answers to windows that are known"),
        ({"on_policy": 1.5}, "numbers from 0.0 to 1.0"),
        ({"curriculum": "student"}, "none, teacher, original"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        build(TRAIN_METHODS["distill"], fields)


def test_the_seed_is_the_writers(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Another seed begins elsewhere and draws otherwise; the same one writes the same."""
    loaded = load(tiny_llama)
    found = {}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        fields = Distill(windows=2, length=16, seed=seed, written=1.0, prompt_tokens=4)
        made = written_text(
            [lambda: loaded], complete, read_text(str(text_file)), (fields, fields), tmp_path / folder, {}, Silent()
        )
        found[folder] = made.content
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]


def test_every_chunk_is_drawn_by_a_seed_of_its_own(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    loaded, seeds = load(tiny_llama), []

    def complete_and_tell(*given: Any, seed: int, **named: Any) -> torch.Tensor:
        seeds.append(seed)
        return complete(*given, seed=seed, **named)

    for seed in (0, 1):
        fields = Distill(windows=16, length=8, seed=seed, written=1.0, prompt_tokens=4)
        text, both = read_text(str(text_file)), (fields, fields)
        written_text([lambda: loaded], complete_and_tell, text, both, tmp_path / str(seed), {}, Silent())
    assert len(set(seeds)) == len(seeds) == 4


def test_the_loss_of_a_window_is_that_of_its_next_tokens(tiny_llama: Path) -> None:
    loaded, ids = load(tiny_llama), torch.arange(2, 26).reshape(2, 12)
    found = window_losses(loaded, ids)
    for row, loss in zip(ids, found, strict=True):
        with torch.no_grad():
            logs = loaded.model(input_ids=row.unsqueeze(0)).logits[0].float().log_softmax(-1)
        expected = -sum(float(logs[i, row[i + 1]]) for i in range(11)) / 11
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_windows_drawn_by_another_training_are_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    fields = {**HOW, "steps": 1, "written": 0.0, "adversarial": 0.0, "curriculum": "none"}
    train(Distill(**fields, text=str(text_file)), job(tiny_llama, tmp_path / "out"))
    with pytest.raises(UsageError, match=r"drawn holds the windows drawn of another training \(seed differ\)"):
        train(Distill(**fields, seed=1, text=str(text_file)), job(tiny_llama, tmp_path / "out"))
