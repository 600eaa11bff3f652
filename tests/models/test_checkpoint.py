"""Reading is exact; damage of every kind is found, before any work, and named."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fettle.errors import CheckpointError, NonFiniteError
from fettle.models.checkpoint import INDEX, SINGLE, Checkpoint, check_finite
from fettle.models.header import read_header


def rewrite_header(path: Path, change, *, tail: bytes | None = None) -> None:  # type: ignore[no-untyped-def]
    """Applies `change` to the header's table and writes the file again with the same data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (data[8 + length :] if tail is None else tail))


def test_tensors_are_read_exactly(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    assert len(checkpoint.shards) > 1
    expected = {name: t for shard in checkpoint.shards for name, t in load_file(sharded / shard).items()}
    assert set(checkpoint.entries) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert found.data_ptr() % 64 == 0
        assert torch.equal(checkpoint.read_rows(name, 1, 3), tensor[1:3])
    assert checkpoint.nbytes == sum(t.nbytes for t in expected.values())


def test_every_dtype_and_empty_tensors_come_back(tmp_path: Path) -> None:
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(7).half(),
        "f64": torch.randn(2, 2, dtype=torch.float64),
        "i64": torch.tensor([-(2**60)]),
        "u8": torch.tensor([255], dtype=torch.uint8),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_dtype_is_the_configs_or_that_of_most_bytes(plain: Path) -> None:
    assert Checkpoint.open(plain).dtype == torch.bfloat16
    (plain / "config.json").write_text("{}")
    assert Checkpoint.open(plain).dtype == torch.float32


def test_hashes_are_of_the_files(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    expected = {n: hashlib.sha256((sharded / n).read_bytes()).hexdigest() for n in ("config.json", *checkpoint.shards)}
    assert checkpoint.file_hashes() == expected


@pytest.mark.parametrize("keep", [0, 3, 8, 40, -60, -30, -1])
def test_a_truncated_shard_is_named(plain: Path, keep: int) -> None:
    path = plain / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"shard model\.safetensors"):
        Checkpoint.open(plain)


def test_a_shard_cut_in_its_data_names_the_tensor(plain: Path) -> None:
    path = plain / SINGLE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"truncated: tensor 'c\.codes' ends 3 bytes after"):
        Checkpoint.open(plain)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 10_000])
def test_an_absurd_header_length_allocates_nothing(plain: Path, length: int) -> None:
    path = plain / SINGLE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
        Checkpoint.open(plain)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # KB


def huge(header: dict) -> None:
    header["a.weight"]["shape"] = [2**40, 2**20]


def negative(header: dict) -> None:
    header["a.weight"]["shape"] = [-3, -4]


def overlap(header: dict) -> None:
    header["b.weight"]["data_offsets"] = [40, 52]


def gap(header: dict) -> dict:
    return {n: f for n, f in header.items() if n != "b.weight"}


def unknown_dtype(header: dict) -> None:
    header["a.weight"]["dtype"] = "F31"


def beyond(header: dict) -> None:
    header["c.codes"].update(shape=[500], data_offsets=[60, 560])


def no_shape(header: dict) -> None:
    del header["c.codes"]["shape"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge, r"a\.weight.*needs \d{15,} bytes"),
        (negative, r"a\.weight.*impossible shape"),
        (overlap, r"b\.weight.*overlaps"),
        (gap, r"c\.codes.*gap"),
        (unknown_dtype, r"a\.weight.*unknown dtype 'F31'"),
        (beyond, r"truncated: tensor 'c\.codes'"),
        (no_shape, r"c\.codes.*lacks"),
    ],
)
def test_a_header_that_lies_is_refused(plain: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    rewrite_header(plain / SINGLE, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(plain)


def test_bytes_behind_the_last_tensor_are_refused(plain: Path) -> None:
    with (plain / SINGLE).open("ab") as file:
        file.write(b"12345")
    with pytest.raises(CheckpointError, match=r"5 bytes follow its last tensor 'c\.codes'"):
        Checkpoint.open(plain)


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"a": 3}', "[" * 5000, '{"a": {}, "a": {}}'])
def test_a_header_that_is_no_table_is_refused(plain: Path, text: str) -> None:
    data = text.encode()
    (plain / SINGLE).write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(plain)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_in_the_header_never_gives_other_bytes(plain: Path, data: st.DataObject) -> None:
    """Refused, or (in a tensor's name, or blanks) every tensor that keeps its name keeps its type, shape and place."""
    path = plain / SINGLE
    whole = path.read_bytes()
    sound = read_header(path)
    length = 8 + int.from_bytes(whole[:8], "little")
    place, bit = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        found = read_header(path)
    except CheckpointError as error:
        assert path.name in str(error)
    else:
        places = {(e.dtype.itemsize, e.start, e.nbytes) for e in found.values()}
        assert places == {(e.dtype.itemsize, e.start, e.nbytes) for e in sound.values()}
    finally:
        path.write_bytes(whole)


def test_a_missing_shard_and_a_lying_index_are_named(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    index = json.loads((folder / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))

    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost.weight": shard}}))
    with pytest.raises(CheckpointError, match=r"ghost\.weight"):
        Checkpoint.open(folder)
    other = next(s for s in index["weight_map"].values() if s != shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: other}}))
    with pytest.raises(CheckpointError, match=rf"{name}.*lies in {shard}"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: "../" + shard}}))
    with pytest.raises(CheckpointError, match="not a safetensors file in the folder"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"shard {shard} is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name", ["x" * 288 + ".safetensors", "a\0b.safetensors", "\ud800.safetensors", "a/b.safetensors"]
)
def test_a_shard_name_that_no_file_can_have_is_refused(plain: Path, name: str) -> None:
    (plain / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(CheckpointError, match="not a safetensors file in the folder"):
        Checkpoint.open(plain)


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_pipe_in_place_of_a_file_does_not_hang(plain: Path, name: str) -> None:
    (plain / name).unlink()
    os.mkfifo(plain / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*no regular file"):
        Checkpoint.open(plain)


def test_one_tensor_in_two_shards_is_refused(plain: Path) -> None:
    shutil.copy(plain / SINGLE, plain / "second.safetensors")
    (plain / INDEX).write_text(json.dumps({"weight_map": {"a.weight": SINGLE, "b.weight": "second.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"stands in two shards"):
        Checkpoint.open(plain)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.ckpt", "x.pth"])
def test_pickles_are_refused_and_not_opened(plain: Path, name: str) -> None:
    (plain / SINGLE).unlink()
    (plain / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match="pickle"):
        Checkpoint.open(plain)
    assert not (plain / "pwned").exists() and not Path("pwned").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ],
)
def test_remote_code_is_refused(plain: Path, name: str, content: dict) -> None:
    (plain / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{name} has an auto_map"):
        Checkpoint.open(plain)


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_a_damaged_config_is_named(plain: Path, content: str) -> None:
    (plain / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(plain)


def test_missing_files_are_named(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (plain / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        Checkpoint.open(plain)
    (plain / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(plain)


def test_a_flipped_bit_in_a_weight_is_found_by_its_hash(plain: Path) -> None:
    checkpoint = Checkpoint.open(plain)
    assert checkpoint.verify_hashes() == 0
    recorded = {n: hashlib.sha256(checkpoint.read(n).view(torch.uint8).numpy()).hexdigest() for n in checkpoint.entries}
    (plain / "fettle.json").write_text(json.dumps({"tensors": recorded}))
    assert Checkpoint.open(plain).verify_hashes() == 3
    data = bytearray((plain / SINGLE).read_bytes())
    data[checkpoint.entries["b.weight"].start + 5] ^= 1
    (plain / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'b\.weight' in shard model\.safetensors is damaged.*--fresh"):
        Checkpoint.open(plain).verify_hashes()


def test_a_missing_tensor_or_impossible_rows_are_named(plain: Path) -> None:
    checkpoint = Checkpoint.open(plain)
    with pytest.raises(CheckpointError, match="'nothing' is missing"):
        checkpoint.read("nothing")
    with pytest.raises(CheckpointError, match="rows 1:9"):
        checkpoint.read_rows("a.weight", 1, 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_a_number_is_named_with_its_block_and_place(value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 6, dtype=dtype)
    check_finite("model.layers.7.mlp.up_proj.weight", weight)
    weight[2, 3] = value
    with pytest.raises(NonFiniteError, match=r"model\.layers\.7\.mlp\.up_proj\.weight.*block 7.*1 values.*\[2, 3\]"):
        check_finite("model.layers.7.mlp.up_proj.weight", weight)
    with pytest.raises(NonFiniteError, match="outside the blocks"):
        check_finite("lm_head.weight", weight)


def test_large_but_finite_values_are_fine() -> None:
    check_finite("x", torch.full((3,), torch.finfo(torch.float32).max))
    check_finite("codes", torch.tensor([1, 2]))
    check_finite("none", torch.empty(0))
