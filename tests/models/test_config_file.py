"""What config.json cannot say is found when the folder is opened, by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fettle.errors import CheckpointError
from fettle.models.checkpoint import Checkpoint
from fettle.models.config_file import context_length, read_config, read_json


def changed(folder: Path, key: str, value: str) -> Path:
    """Puts `value`, as JSON spells it, at `key`."""
    path = folder / "config.json"
    fields = {k: v for k, v in json.loads(path.read_text()).items() if k != key}
    path.write_text(json.dumps(fields)[:-1] + f', "{key}": {value}}}')
    return folder


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("rms_norm_eps", "NaN", "rms_norm_eps is nan"),
        ("rope_theta", "1e999", "rope_theta is inf"),
        ("rope_scaling", '{"factor": [1, -Infinity]}', r"rope_scaling\.factor\[1\] is -inf"),
        ("rms_norm_eps", '"x"', "rms_norm_eps is 'x', and must be a number"),
        ("hidden_act", "5", "hidden_act is 5"),
        ("torch_dtype", '"float99"', "torch_dtype is 'float99'"),
        ("dtype", '"nn"', "dtype is 'nn'"),
        ("dtype", "[]", r"dtype is \[\]"),
        ("max_position_embeddings", '"512"', "max_position_embeddings is '512', and must be a whole number"),
        ("n_positions", "0", "n_positions is 0"),
        ("tie_word_embeddings", '"no"', "tie_word_embeddings is 'no', and must be true or false"),
        ("architectures", '{"a": 1}', "architectures is {'a': 1}, and must be a list of class names"),
        ("architectures", "[5]", r"architectures is \[5\]"),
        ("eos_token_id", '[1, "x"]', "eos_token_id is"),
        ("pad_token_id", "true", "pad_token_id is True"),
        ("quantization_config", '"int8"', "quantization_config is 'int8', and must be an object"),
        ("quantization_config", "[4]", r"quantization_config is \[4\]"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_key(plain: Path, key: str, value: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json is damaged: {named}"):
        Checkpoint.open(changed(plain, key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", "10000"), ("sliding_window", "null"), ("eos_token_id", "[1, 2]"), ("pad_token_id", "-1"),
        ("torch_dtype", '"torch.bfloat16"'), ("dtype", '"auto"'), ("architectures", "[]"), ("rope_scaling", "null"),
        ("quantization_config", "null"), ("anything_else", '{"a": [true, "x"]}'),
    ],
)  # fmt: skip
def test_what_models_do_say_is_let_through(plain: Path, key: str, value: str) -> None:
    assert read_config(changed(plain, key, value))[key] == json.loads(value)


def test_what_may_not_be_read_is_not_called_damaged(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, **options: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Permission denied\)\. Check") as caught:
        read_json(plain / "config.json")
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "n_ctx"])
def test_the_context_has_several_names(key: str) -> None:
    assert context_length({key: 64}) == 64
    assert context_length({}) is None
