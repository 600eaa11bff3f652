"""Distillation and healing on a tiny model: students, what learns, zeros that stay, the written files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fettle.errors import CheckpointError, RecipeError, UsageError
from fettle.methods.train import Distill
from fettle.methods.train.curve import Curve
from fettle.methods.train.distillation import Distillation
from fettle.methods.train.layer_maps import layer_map
from fettle.methods.train.outputs import Observed
from fettle.methods.train.sources.mix import MADE
from fettle.methods.train.students import write_student
from fettle.methods.train.teachers import Live
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel, load

from ...parity.tiny_models import write_model

Trained = Callable[..., tuple[Path, Curve]]
IDS = torch.arange(2, 22).unsqueeze(0)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_student_computes_with_the_teachers_kept_blocks(family: str, tmp_path: Path) -> None:
    write_model(family, tmp_path / "teacher")
    checkpoint = Checkpoint.open(tmp_path / "teacher")
    anatomy = read_anatomy(checkpoint)
    kept = layer_map("uniform", 1, len(anatomy.blocks))
    write_student(checkpoint, anatomy, kept, tmp_path / "student")
    student, teacher = load(tmp_path / "student"), load(tmp_path / "teacher")
    name = anatomy.blocks[0].name.rpartition(".")[0]
    blocks = teacher.model.get_submodule(name)
    alone = torch.nn.ModuleList([blocks[kept[0]]])
    for block in alone:  # a block knows its number for the cache alone
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = 0
    parent, _, leaf = name.rpartition(".")
    setattr(teacher.model.get_submodule(parent), leaf, alone)
    teacher.model.config.num_hidden_layers = 1
    with torch.no_grad():
        assert torch.allclose(
            student.model(IDS, use_cache=False).logits, teacher.model(IDS, use_cache=False).logits, atol=1e-5
        )


def test_blocks_that_know_their_number_are_not_moved(tmp_path: Path) -> None:
    write_model("gpt2", tmp_path / "teacher")  # with scale_attn_by_inverse_layer_idx
    checkpoint = Checkpoint.open(tmp_path / "teacher")
    with pytest.raises(RecipeError, match="another function; allowed: the first blocks alone"):
        write_student(checkpoint, read_anatomy(checkpoint), [1], tmp_path / "student")


def test_a_student_learns_from_its_teacher_and_is_written_whole(tiny_llama: Path, trained: Trained) -> None:
    output, curve = trained(Distill, tiny_llama, layers=1, steps=12, learning_rate=3e-3, look_every=4)
    assert curve.held_back[0][0] == 0
    assert curve.best is not None
    assert curve.best[1] < 0.9 * curve.held_back[0][1]
    record = json.loads((output / "fettle.json").read_text())
    assert record["training"]["method"] == "distill"
    assert record["training"]["steps"] == 12
    assert record["reshaped"] is True
    assert not {"text", "teacher"} & set(record["training"]["fields"])  # no path of this machine
    assert Checkpoint.open(output).verify_hashes() == len(tensors(output))
    loaded = load(output)
    assert len(loaded.anatomy.blocks) == 1
    assert torch.isfinite(loaded.model(IDS).logits).all()


def test_a_damaged_tensor_of_a_trained_model_is_found(tiny_llama: Path, trained: Trained) -> None:
    output, _ = trained(Distill, tiny_llama, steps=1, hard=1.0)
    shard = sorted(output.glob("*.safetensors"))[0]
    whole = bytearray(shard.read_bytes())
    whole[-5] ^= 1
    shard.write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match="damaged"):
        load(output)


@pytest.mark.parametrize(("trains", "moved"), [("norms", {1}), ("blocks", {1, 2}), ("all", {1, 2})])
def test_only_what_trains_names_moves(tiny_llama: Path, trained: Trained, trains: str, moved: set[int]) -> None:
    output, _ = trained(
        Distill, tiny_llama, trains=trains, hard=1.0, soft=0.0, learning_rate=1e-2, keep="last", steps=2
    )
    before, after = tensors(tiny_llama), tensors(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {before[name].dim() for name in changed} == moved
    assert any("embed_tokens" in name or "lm_head" in name for name in changed) == (trains == "all")
    assert all(after[name].dtype == before[name].dtype for name in before)


def test_zeros_of_a_pruned_model_stay_zeros(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    loaded = load(tiny_llama)
    with torch.no_grad():
        for linear in loaded.anatomy.linears():
            weight = loaded.model.get_parameter(linear.slot.parameter)
            weight[weight.abs() < weight.abs().median()] = 0
    from fettle.methods.train.writing import write_trained

    write_trained(loaded.model, Checkpoint.open(tiny_llama), loaded.anatomy, pruned, {})
    how = {"steps": 3, "learning_rate": 1e-2, "weight_decay": 0.1, "keep": "last"}
    held, _ = trained(Distill, pruned, tiny_llama, keep_zeros=True, **how)
    free, _ = trained(Distill, pruned, tiny_llama, **how)
    names = [linear.weight_name for linear in loaded.anatomy.linears()]
    before, after, loose = tensors(pruned), tensors(held), tensors(free)
    for name in names:
        zeros = before[name] == 0
        assert zeros.float().mean() > 0.45
        assert (after[name][zeros] == 0).all()
        assert not torch.equal(after[name], before[name])
        assert (loose[name][zeros] != 0).any()  # without the mask they grow back


REST = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("logits", "relations", "distances")]


@pytest.mark.parametrize("signal", ["features", "attention", "values", *REST])
def test_every_signal_trains_a_student_of_another_depth(tiny_llama: Path, trained: Trained, signal: str) -> None:
    _, curve = trained(Distill, tiny_llama, layers=1, soft=0.0, **{signal: 1.0}, steps=6, learning_rate=2e-3)
    assert curve.best is not None
    assert curve.best[1] < curve.held_back[0][1]


def test_kept_answers_train_as_the_live_teacher_does(tiny_llama: Path, trained: Trained) -> None:
    _, live = trained(Distill, tiny_llama, layers=1)
    _, kept = trained(Distill, tiny_llama, layers=1, teacher_top_k=320)
    assert kept.losses == pytest.approx(live.losses, rel=1e-4)
    assert (live.answer_bytes, kept.answer_bytes) == (0, 10 * 31 * (8 * 320 + 4))  # 8 windows, and 2 held back


def test_a_teacher_with_other_tokens_is_refused(tiny_llama: Path, trained: Trained) -> None:
    with pytest.raises(UsageError, match="different tokenizers"):
        trained(Distill, tiny_llama, teacher="demo")


def test_codes_are_not_trained_as_if_they_were_dense(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    import fettle

    fettle.compress(tiny_llama, tmp_path / "codes", "round-to-nearest-8bit", evaluate=False)
    with pytest.raises(UsageError, match="use qat to train the codes, or adapter"):
        trained(Distill, tmp_path / "codes")


def test_a_family_without_values_of_their_own_refuses_their_relations(tmp_path: Path, trained: Trained) -> None:
    from fettle.methods.train.outputs import Observed

    write_model("gpt2", tmp_path / "gpt2")
    loaded = load(tmp_path / "gpt2")
    with pytest.raises(RecipeError, match="no linear for the values alone; set values: 0"):
        Observed(loaded.model, loaded.model, loaded.anatomy, ("values",))


def test_what_a_stage_reads_may_be_its_teacher(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    """An assistant: the student is made of it and compared with it, so it starts without any loss."""
    other = tmp_path / "other"
    write_model("llama", other)
    output, curve = trained(Distill, tiny_llama, original=other, teacher="before", steps=1)
    assert curve.losses[0] == pytest.approx(0.0, abs=1e-5)
    assert (output / "fettle.json").is_file()


def objective(model: Path, **fields: Any) -> tuple[Distillation, LoadedModel, LoadedModel]:
    """A student of two blocks beside a teacher of the same two, told to look at them the other way round."""
    student, teacher = load(model), load(model)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    method = Distill(soft=0.0, **fields)
    seen = [Observed(m.model, m.model, m.anatomy, tuple(method.weights())) for m in (student, teacher)]
    made = Distillation(seen[0], method, teacher=Live(seen[1]), layers=[1, 0], learned=5)
    made.fit_shapes(IDS)
    return made, student, teacher


@pytest.mark.parametrize("signal", ["features", "attention"])
def test_a_layer_looks_where_the_map_says(tiny_llama: Path, signal: str) -> None:
    made, student, teacher = objective(tiny_llama, **{signal: 1.0})
    for looked_at in (student, teacher):
        looked_at.model.set_attn_implementation("eager")  # which tells its maps
    with torch.no_grad():
        found = made(torch.tensor([0]), IDS)["loss"]
        ours, theirs = (
            m.model(input_ids=IDS, output_hidden_states=True, output_attentions=True) for m in (student, teacher)
        )
    states = [(ours.hidden_states[i + 1], theirs.hidden_states[2 - i]) for i in range(2)]
    maps = [(ours.attentions[i], theirs.attentions[1 - i]) for i in range(2)]
    expected = {
        "features": [(a - b).square().mean() / b.square().mean() for a, b in states],
        "attention": [(a - b).square().mean() * IDS.shape[1] for a, b in maps],
    }[signal]
    assert float(found) == pytest.approx(float(sum(expected)) / 2, rel=1e-4)


def test_nobody_learns_its_own_words_as_if_they_were_text(tiny_llama: Path) -> None:
    """Of two windows one is the student's own: hard is the other one's, and weighs as the step's text does."""
    made, student, _ = objective(tiny_llama, hard=1.0, on_policy=0.5)
    two = torch.cat([IDS, IDS.flip(1)])
    with torch.no_grad():
        logits = student.model(input_ids=two).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), two[:, 1:], reduction="none").mean(1)
        found = [float(made(torch.tensor(place), two)["loss"]) for place in ([MADE, 0], [0, 1], [MADE, MADE], [5, 6])]
    text, both = float(each[1]), float(each.mean())
    assert found == pytest.approx([text, 2 * both, 0.0, both], rel=1e-5)  # the last two windows are held back
