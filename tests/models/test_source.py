"""What a user's word for a model means, and what is said when it means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fettle.errors import ModelError
from fettle.models import source


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert source.resolve(tmp_path) == tmp_path
    assert source.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "word",
    ["./nowhere", "/nowhere/at/all", "~nosuch/x", "nowhere", "../a/b", "a b/c", ""],
)
def test_what_is_no_folder_and_no_hub_id_says_what_to_give(word: str) -> None:
    with pytest.raises(ModelError, match="hub id"):
        source.resolve(word if word else "does-not-exist")


@pytest.mark.parametrize("word", ["models/run--1", "a/b..c", "a/-b"])
def test_a_mistyped_path_that_looks_like_a_hub_id_is_one_sentence(word: str) -> None:
    with pytest.raises(ModelError, match=f"there is no folder '{word}' here.*Check the path"):
        source.resolve(word)


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        source.resolve(file)


def test_the_hub_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no folder 'someone/some-model'.*go online"):
        source.resolve("someone/some-model")


def test_the_embedded_model_is_a_folder_or_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match="embedded model is missing"):
        source.resolve("demo")
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.json").write_text("{}")
    assert source.resolve("demo") == tmp_path / "reference"
