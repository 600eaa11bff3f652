"""What every method that reshapes a model owes, over the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from tests.methods.reshape.written import subject_of
from transformers import AutoTokenizer

from fettle.data.windows import Text, calibration_windows
from fettle.methods.registry import METHODS, MODEL_METHODS, from_fields, to_fields
from fettle.methods.reshape.subject import Reshaped, Subject
from fettle.models.anatomy import read_anatomy
from fettle.models.reshaped_config import require_known
from fettle.workers import Workers

#: a case of each that a small dense model can take; experts have a model of their own
FIELDS: dict[str, dict[str, Any]] = {
    "drop_layers": {"drop": 1},
    "fewer_experts": {},
    "narrow": {"parameters": "0.7x", "multiple": 4},
    "resize": {"parameters": "0.7x", "multiple": 4},
    "share_blocks": {"difference_rank": 2},
    "trim_vocabulary": {},
}
every_method = pytest.mark.parametrize("name", MODEL_METHODS)
DENSE = [name for name in MODEL_METHODS if name != "fewer_experts"]


@pytest.fixture(scope="module")
def subject(tiny_llama, text_file) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = Text(text_file.read_text()[:3000], "text", "")
    windows = calibration_windows(tokenizer, text, windows=4, length=24, seed=0)
    base = subject_of(tiny_llama, windows.ids)
    return Subject(
        checkpoint=base.checkpoint, anatomy=base.anatomy, windows=windows.ids, workers=base.workers,
        used_tokens=lambda: sorted(set(tokenizer(text.content[:100])["input_ids"])),
    )  # fmt: skip


def reshaped(name: str, subject: Subject, threads: int) -> Reshaped:
    with Workers(threads) as workers:
        given = Subject(**{**vars(subject), "workers": workers})
        return from_fields(name, FIELDS[name]).reshape(given)


@every_method
def test_every_method_declares_itself(name: str) -> None:
    cls = MODEL_METHODS[name]
    assert cls.name == name and name not in METHODS
    assert cls.title and cls.source and cls.objective == "shape"
    method = from_fields(name, FIELDS[name])
    assert set(method.needs()) <= set(cls.statistics) == {"text"}
    assert method.label()
    assert from_fields(name, yaml.safe_load(yaml.safe_dump(to_fields(method)))) == method


@pytest.mark.parametrize("name", DENSE)
def test_the_result_is_a_smaller_model_that_transformers_knows(name: str, subject: Subject) -> None:
    found = reshaped(name, subject, 1)
    require_known(found.view.config)
    anatomy = read_anatomy(found.view)  # every shape is what the configuration says
    assert len(anatomy.blocks) == found.view.config["num_hidden_layers"]
    assert sum(entry.nbytes for entry in found.view.entries.values()) < subject.checkpoint.nbytes
    for key, entry in found.view.entries.items():
        tensor = found.view.read(key)
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape)
        assert entry.nbytes == (0 if key in found.view.shared else tensor.nbytes)
        if entry.shape[0] > 2:
            assert torch.equal(found.view.read_rows(key, 1, 3), tensor[1:3])
    assert found.view.config["architectures"] == subject.checkpoint.config["architectures"]
    yaml.safe_dump(dict(found.decided))  # plain data


@pytest.mark.parametrize("name", DENSE)
def test_threads_and_repetition_change_no_bit(name: str, subject: Subject) -> None:
    one, other = (reshaped(name, subject, threads) for threads in (1, 2))
    assert one.decided == other.decided and one.view.config == other.view.config
    assert all(torch.equal(one.view.read(key), other.view.read(key)) for key in one.view.entries)
    assert [one.view.tensor_sha256(key) for key in one.view.entries] == [
        other.view.tensor_sha256(key) for key in other.view.entries
    ]
