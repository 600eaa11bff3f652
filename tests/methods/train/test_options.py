"""Fields that do not fit together are refused with the allowed set."""

from __future__ import annotations

from typing import Any

import pytest

from fettle.errors import RecipeError
from fettle.methods.registry import build
from fettle.methods.train import TRAIN_METHODS, Distill


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("distill", {"soft": 0.0}, "every signal has the weight 0"),
        ("distill", {"batch_windows": 8, "accumulate": 3}, "accumulate=3 does not divide batch_windows=8"),
        ("distill", {"minutes": -1.0}, "minutes=-1.0 cannot be"),
        ("distill", {"tokens": 10**15}, r"tokens=10+ with length=256 and .* allowed: at most 10000000 steps"),
        ("qat", {"batch_windows": 10**12}, r"steps=100 and .* read 10+ windows; allowed: .* 1000000000 windows"),
        ("sparse", {"checkpoint_every": 10**30}, "checkpoint_every=10+ cannot be; allowed: integers from 1 to 9223"),
        ("distill", {"steps": 5, "minutes": 3.0}, "steps=5, minutes=3.0: .* leave out all but one of steps, minutes"),
        ("qat", {"steps": 5, "tokens": 300}, "steps=5, tokens=300: .* leave out all but one of steps, tokens"),
        ("adapter", {"tokens": 300, "minutes": 3.0}, "leave out all but one of tokens, minutes"),
        ("sparse", {"minutes": 3.0}, "in whose shares masks grow .* allowed: steps or tokens"),
        ("distill", {"minutes": 3.0, "curriculum": "teacher"}, "grows with the share of the steps"),
        ("qat", {"begin": "random", "trains": "codes"}, "allowed with begin: random: all"),
        ("distill", {"begin": "random", "trains": "norms"}, "allowed: trains: all, without keep_zeros"),
        ("distill", {"teacher_top_k": 4, "features": 1.0}, "features need the teacher itself"),
        ("distill", {"teacher": "a,b", "features": 1.0}, "no mean of features"),
        ("distill", {"teacher": "a,b", "teacher_weights": "1"}, "give one positive number for each"),
        ("distill", {"teacher": "a,b", "teacher_weights": "1,-1"}, "allowed: positive numbers"),
        ("distill", {"divergence": "backward"}, "forward, reverse, jensen_shannon"),
        ("distill", {"step": 3}, "did you mean 'steps'"),
        ("qat", {"grid": "learned"}, "learned levels have no scale"),
        (
            "qat",
            {
                "activations": "dynamic",
                "activation_grid": "float",
                "activation_bits": 4,
                "activation_granularity": "tensor_group",
            },
            "nothing in it can learn",
        ),
        ("adapter", {"kind": "prompt", "merge": True}, "cannot be merged"),
        ("adapter", {"targets": "attention", "ranks": "query=2,down=4"}, "names down, which targets leaves out"),
        ("adapter", {"kind": "ia3", "ranks": "down=4"}, "ranks=down=4 with kind=ia3, which has none; allowed: lora"),
        ("adapter", {"kind": "ia3", "targets": "mlp,head"}, "names head, where kind=ia3"),
        ("adapter", {"start": "eva", "targets": "mlp,embedding"}, "names embedding, where kind=lora with start=eva"),
        ("qat", {"held_back_text": "b.txt", "held_back": 0}, "allowed: another text"),
        ("qat", {"held_back_text": "b.txt", "text": "b.txt"}, "allowed: another text"),
        ("qat", {"rate_in": "levels", "weight_decay": 0.1}, "allowed: weight_decay: 0"),
        ("adapter", {"kind": "prefix", "features": 1.0}, "use hard and soft"),
        ("adapter", {"kind": "ia3", "start": "residual"}, "start=residual is LoRA's"),
    ],
)
def test_an_impossible_field_is_refused_before_any_work(name: str, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        build(TRAIN_METHODS[name], fields)


def test_tokens_become_whole_steps() -> None:
    assert Distill(tokens=1000, batch_windows=2, length=100).planned_steps == 5
    assert Distill(tokens=1001, batch_windows=2, length=100).planned_steps == 6
    assert Distill(steps=7).planned_steps == 7
    assert Distill().planned_steps == 100


def test_weights_of_several_teachers_become_shares() -> None:
    assert Distill(teacher="a, b", teacher_weights="3,1").parsed_teacher_weights() == [0.75, 0.25]
    assert Distill(teacher="a,b").parsed_teacher_weights() == [0.5, 0.5]
