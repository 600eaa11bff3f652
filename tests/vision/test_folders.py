"""Which folders a pruned classifier may be written to: new ones, empty ones, and those that such a run wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.vision.networks import write

import fettle
from fettle.errors import UsageError
from fettle.pipeline.journal import locked, run_folder
from fettle.pipeline.recipe import Recipe, parse_recipe
from fettle.vision import compressing
from fettle.vision.classifier import open_classifier

Folder = Callable[[str], Path]


def recipe(sparsity: float = 0.5) -> Recipe:
    return parse_recipe({"name": "filters", "steps": [{"method": "prune_filters", "sparsity": sparsity}]}, "filters")


def prune(base: Path, out: Path, sparsity: float = 0.5, **options: Any) -> None:
    fettle.compress(base, out, recipe(sparsity), evaluate=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("marker", [None, '{"kind": "language_model"}', "{damaged"])
def test_a_folder_of_others_is_left_as_it_is(
    fresh: bool, marker: str | None, classifier: Folder, tmp_path: Path
) -> None:
    out = write("vgg16", tmp_path / "mine")
    if marker is not None:
        (out / "fettle.json").write_text(marker)
    before = contents(out)
    with pytest.raises(UsageError, match=r"mine is not empty.*Name another folder"):
        prune(classifier("vgg16_bn"), out, fresh=fresh)
    assert contents(out) == before and not run_folder(out).exists()


def test_files_are_no_folders(classifier: Folder, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="out is a file"):
        prune(classifier("vgg16"), tmp_path / "out")
    (tmp_path / "other.run").write_text("mine")
    with pytest.raises(UsageError, match=r"other\.run is a file"):
        prune(classifier("vgg16"), tmp_path / "other")


def test_an_empty_folder_and_one_of_ours_are_written_to(classifier: Folder, tmp_path: Path) -> None:
    base, out = classifier("vgg16"), tmp_path / "out"
    out.mkdir()
    prune(base, out)
    first = contents(out)
    prune(base, out, 0.25, fresh=True)
    assert contents(out)["model.safetensors"] != first["model.safetensors"]
    shutil.rmtree(out)  # its run folder is still there, and says nothing of what now takes its place
    write("vgg16", out)
    with pytest.raises(UsageError, match="is not empty"):
        prune(base, out, fresh=True)


def test_a_run_that_was_stopped_while_it_wrote_starts_again(
    classifier: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out, whole = classifier("vgg16"), tmp_path / "out", tmp_path / "whole"
    prune(base, whole)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compressing, "copy_side_files", stopped)
        with pytest.raises(BaseException):  # noqa: B017
            prune(base, out)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    prune(base, out)
    assert contents(out)["fettle.json"] == contents(whole)["fettle.json"]
    assert open_classifier(out) is not None and not (run_folder(out) / "pruning.json").exists()


def test_two_runs_do_not_write_one_folder(classifier: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(run_folder(out)), pytest.raises(UsageError, match="another run works on"):
        prune(classifier("vgg16"), out)
    assert not out.exists()
