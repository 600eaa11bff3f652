"""The run folder: what is believed of it on a resume, what counts as torn, and that nobody else's files are touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fettle
from fettle.errors import CheckpointError, ResumeError, UsageError
from fettle.pipeline.journal import Journal, run_folder
from fettle.pipeline.recipe import parse_recipe

from .conftest import digests

RECIPE = parse_recipe({"name": "plain", "steps": [{"method": "round_to_nearest"}]}, "test")
SHARD = "model-{:05d}-of-00003.safetensors"


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    fettle.compress(tiny_llama, out, RECIPE, evaluate=False)
    return out


@pytest.fixture()
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(run_folder(finished), run_folder(tmp_path / "out"))
    return tmp_path / "out"


def again(model: Path, out: Path, *, fresh: bool = False) -> fettle.api.Compression:
    return fettle.compress(model, out, RECIPE, evaluate=False, fresh=fresh)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_shard_that_is_not_what_was_written_is_written_again(
    tiny_llama: Path, finished: Path, out: Path, number: int, how: str
) -> None:
    shard = out / SHARD.format(number)
    flip(shard) if how == "flip" else shard.unlink()
    made = again(tiny_llama, out)
    assert not made.resumed_whole
    assert digests(out) == digests(finished)
    assert again(tiny_llama, out).resumed_whole


def test_the_only_sound_shards_are_kept_and_the_folder_does_not_look_finished(tiny_llama: Path, out: Path) -> None:
    flip(out / SHARD.format(2))
    kept = (out / SHARD.format(1)).stat().st_mtime_ns
    identity = json.loads((run_folder(out) / "identity.json").read_text())
    with Journal.open(out, identity, fresh=False) as journal:
        assert len(journal.records(out)) == 1
        assert [path.name for path in out.iterdir()] == [SHARD.format(1)]
    again(tiny_llama, out)
    assert (out / SHARD.format(1)).stat().st_mtime_ns == kept


def test_nothing_is_said_to_be_finished_that_changed_meanwhile(
    tiny_llama: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Journal.append

    def append(self: Journal, record: object) -> None:
        real(self, record)  # type: ignore[arg-type]
        if record.unit == 1:  # type: ignore[attr-defined]
            flip(tmp_path / "out" / SHARD.format(1))

    monkeypatch.setattr(Journal, "append", append)
    with pytest.raises(CheckpointError, match=rf"{SHARD.format(1)}.*Run the same command again"):
        again(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out" / "fettle.json").exists()
    monkeypatch.undo()
    again(tiny_llama, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(finished)


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b'{"shard": 5}', b"[]", b"5", b"", b"[" * 5000, None],
    ids=["bytes", "short", "list", "number", "empty", "deep", "type"],
)
def test_a_line_that_is_no_record_counts_as_torn(tiny_llama: Path, finished: Path, out: Path, line: bytes) -> None:
    path = run_folder(out) / "journal.jsonl"
    lines = path.read_bytes().splitlines()
    if line is None:
        line = json.dumps(json.loads(lines[1]) | {"shard": 5}).encode()
    path.write_bytes(b"\n".join([lines[0], line, lines[2]]))
    assert not again(tiny_llama, out).resumed_whole
    assert digests(out) == digests(finished)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{}"), ("summary.json", ""), ("summary.json", "[]"), ("summary.json", "[" * 5000),
        ("identity.json", "{"), ("identity.json", "\ud800"), ("identity.json", ""),
    ],
)  # fmt: skip
def test_a_damaged_file_of_the_run_is_named_with_the_way_out(
    tiny_llama: Path, finished: Path, out: Path, name: str, content: str
) -> None:
    (run_folder(out) / name).write_bytes(content.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(ResumeError, match=rf"{name} is damaged.*--fresh"):
        again(tiny_llama, out)
    assert digests(out) == digests(finished)
    assert not again(tiny_llama, out, fresh=True).resumed_whole
    assert digests(out) == digests(finished)


@pytest.mark.parametrize("key", ["evaluation", "completions", "base", "seconds"])
def test_a_summary_that_lacks_a_part_is_named(tiny_llama: Path, out: Path, key: str) -> None:
    path = run_folder(out) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"schema": 99}}))
    with pytest.raises(ResumeError, match=r"summary\.json is damaged"):
        again(tiny_llama, out)


@pytest.mark.parametrize("name", ["fettle.json", "config.json", "model.safetensors.index.json"])
def test_a_finished_folder_whose_own_files_are_damaged_is_completed(
    tiny_llama: Path, finished: Path, out: Path, name: str
) -> None:
    (out / name).write_text("{")
    assert not again(tiny_llama, out).resumed_whole
    assert digests(out) == digests(finished)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("finish", ["identity", "journal"])
def test_files_that_the_run_did_not_write_are_never_deleted(
    tiny_llama: Path, out: Path, fresh: bool, finish: str
) -> None:
    """A run folder is left over; what now lies at the output's place is somebody's own."""
    shutil.rmtree(out)
    out.mkdir()
    mine = {"thesis.txt": "do not lose", "config.json": "{}", "tokenizer.json": "{}", "README.md": "mine"}
    for name, content in mine.items():
        (out / name).write_text(content)
    if finish == "identity":
        (run_folder(out) / "journal.jsonl").unlink()
    with pytest.raises(UsageError, match="did not write"):
        again(tiny_llama, out, fresh=fresh)
    assert {path.name: path.read_text() for path in out.iterdir()} == mine


def test_a_stranger_in_a_finished_folder_survives_a_fresh_start(tiny_llama: Path, out: Path) -> None:
    (out / "thesis.txt").write_text("do not lose")
    again(tiny_llama, out, fresh=True)
    assert (out / "thesis.txt").read_text() == "do not lose"
