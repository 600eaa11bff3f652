"""A file is whole or not there; its size is known before; a full disk says what is missing."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fettle.errors import DiskFullError
from fettle.models import writer
from fettle.models.checkpoint import INDEX, Checkpoint
from fettle.models.header import DTYPES
from tests.apart import run_apart

UNSUPPORTED_BY_TORCH_SAVE = {"U16", "U32", "U64"}
DTYPE = st.sampled_from([dtype for name, dtype in sorted(DTYPES.items()) if name not in UNSUPPORTED_BY_TORCH_SAVE])
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
LAYOUT = st.dictionaries(NAME, st.tuples(DTYPE, st.lists(st.integers(0, 5), max_size=3).map(tuple)), max_size=8)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


@settings(max_examples=80, deadline=None)
@given(layout=LAYOUT, metadata=st.none() | st.just({"format": "pt"}))
def test_the_bytes_are_those_of_safetensors_and_their_number_is_known_before(
    tmp_path_factory: pytest.TempPathFactory,
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str] | None,
) -> None:
    folder = tmp_path_factory.mktemp("write")
    tensors = {name: random_tensor(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    predicted = writer.shard_bytes(layout, metadata)
    digest = writer.write_shard(folder, "x.safetensors", tensors, metadata)
    data = (folder / "x.safetensors").read_bytes()
    assert len(data) == predicted
    assert digest == hashlib.sha256(data).hexdigest()
    save_file(tensors, folder / "reference.safetensors", metadata)
    assert data == (folder / "reference.safetensors").read_bytes()


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "column": base[:, 2], "expert": base.reshape(2, 2, 6)[1], "twice": base}
    writer.write_shard(tmp_path, "x.safetensors", tensors)
    for name, found in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(found, tensors[name])


def test_a_written_folder_opens(tmp_path: Path) -> None:
    first, second = {"a": torch.ones(2)}, {"b": torch.zeros(3, dtype=torch.int32)}
    writer.write_shard(tmp_path, "model-00001-of-00002.safetensors", first)
    writer.write_shard(tmp_path, "model-00002-of-00002.safetensors", second)
    shard_of = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    writer.write_index(tmp_path, shard_of, 20)
    writer.write_json(tmp_path / "config.json", {"model_type": "llama", "words": "Grüße"})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.entries) == {"a", "b"}
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 20
    assert "Grüße" in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.zeros(1000)}
    needed = writer.shard_bytes(writer.layout_of(tensors))
    (tmp_path / "x.safetensors").write_bytes(b"earlier")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: usage._replace(free=needed - 17))
    with pytest.raises(DiskFullError, match=r"x\.safetensors.* 17 bytes are missing"):
        writer.write_shard(tmp_path, "x.safetensors", tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == b"earlier"


def write_beyond_a_limit(folder: Path) -> None:
    """Writes three files where the system lets none be larger than 20,000 bytes; prints what two of them said."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hardest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hardest))
    said = []
    writer.write_shard(folder, "small.safetensors", {"a": torch.zeros(1000)})
    for write in (
        lambda: writer.write_shard(folder, "large.safetensors", {"a": torch.zeros(10_000)}),
        lambda: writer.write_text(folder / "large.txt", "x" * 30_000),
    ):
        with pytest.raises(DiskFullError) as refused:
            write()
        said.append(str(refused.value))
    print(said)


def test_the_system_refusing_a_write_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "large.safetensors").write_bytes(b"earlier")
    ended = run_apart(write_beyond_a_limit, folder, folder=tmp_path)
    assert ended.code == 0, ended.said
    assert "large.safetensors" in ended.said and "large.txt" in ended.said
    assert sorted(p.name for p in folder.iterdir()) == ["large.safetensors", "small.safetensors"]
    assert (folder / "large.safetensors").read_bytes() == b"earlier"


def test_another_error_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    writer.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_side_files_are_copied_but_never_weights_pickles_or_code(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "merges.txt",
        "spiece.model",
        "LICENSE",
    ]
    unwanted = ["config.json", "fettle.json", "model.safetensors", INDEX, "pytorch_model.bin", "modeling.py", "x.pt",
                "pytorch_model.bin.index.json", "README.md"]  # fmt: skip
    for name in wanted + unwanted:
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    assert writer.copy_side_files(source, target) == sorted(wanted)
    assert {p.name: p.read_text() for p in target.iterdir()} == {name: name for name in wanted}
