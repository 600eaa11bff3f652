"""An adapter's folder: written so that it is whole or no adapter yet, and read only where it is whole and fits.

    adapter_model.safetensors   what learned, PEFT's names
    fettle_adapter.json         what it was made from: the base's hashes, its own
    adapter_config.json         PEFT's configuration, last: without it no reader takes the folder for an adapter

PEFT writes its files in place, and its sets in the order of a process's hashes; here each is written at once, and sets
are sorted, so two runs give the same bytes. PEFT reads an adapter of a deeper base without a word and leaves out what
has no place; here that is refused. A foreign adapter without `fettle_adapter.json` is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from fettle.errors import CheckpointError
from fettle.models.checkpoint import Checkpoint, check_finite, file_sha256
from fettle.models.config_file import read_json
from fettle.models.header import read_header
from fettle.models.writer import write_json, write_shard, write_text

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "fettle_adapter.json"
OWN_WORDS = ("lora_", "ia3_", "prompt_embeddings")  # in the names of tensors that are an adapter's alone


def write_adapter(model: Any, base: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Writes what learned of a PEFT model, its record and its configuration.

    Raises:
        NonFiniteError: training left NaN or infinity; names the tensor.
    """
    from peft import get_peft_model_state_dict

    tensors = {
        name: value.contiguous()
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    config = model.peft_config["default"]
    config.base_model_name_or_path = None  # the path of this machine is nobody else's
    folder.mkdir(parents=True, exist_ok=True)
    model.create_or_update_model_card(str(folder))
    write_shard(folder, WEIGHTS, tensors, {"format": "pt"})
    write_record(record, base, folder)
    told = {**config.to_dict(), "inference_mode": True}
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in told.items()}
    write_text(folder / CONFIG, json.dumps(told, indent=2, sort_keys=True))


def write_record(record: Mapping[str, Any], base: Path, folder: Path) -> None:
    """Writes of what base the adapter in `folder` is, and the hash of its weights."""
    weights = folder / WEIGHTS
    told = {**record, "base_files": Checkpoint.open(base).file_hashes()}
    write_json(folder / RECORD, {"schema": 1, **told, "sha256": file_sha256(weights), "bytes": weights.stat().st_size})


def check_adapter(folder: Path, base: Path) -> dict[str, Any]:
    """The configuration of a whole adapter of this base.

    Raises:
        CheckpointError: no adapter as safetensors, damaged files, or one trained on another base.
    """
    config = check_files(folder)
    expected = read_json(folder / RECORD).get("base_files") if (folder / RECORD).is_file() else None
    if expected is not None and expected != Checkpoint.open(base).file_hashes():
        raise CheckpointError(f"the adapter in {folder} was trained on another base than {base}; give that one")
    return config


def check_files(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter whose files are whole; CheckpointError where they are not."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is no adapter: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    read_header(folder / WEIGHTS)
    told = read_json(folder / RECORD).get("sha256") if (folder / RECORD).is_file() else None
    if told is not None and told != file_sha256(folder / WEIGHTS):
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged: its SHA-256 is not the one that {RECORD} recorded when it was written. "
            "Copy the folder again, or train it again with --fresh."
        )
    return config


def unfit(folder: Path, base: Path, why: object) -> CheckpointError:
    """The error for an adapter that the base has no place for."""
    told = " ".join(str(why).split())[:300]
    return CheckpointError(f"the adapter in {folder} does not fit {base}: {told}. Give the base that it was made for")


def require_all_taken(model: nn.Module, name: str, folder: Path, base: Path) -> None:
    """Checks what was read of the adapter `name`.

    Raises:
        CheckpointError: tensors found no place, or places got no tensor.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    from peft import get_peft_model_state_dict

    places = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    stored = read_header(folder / WEIGHTS).keys()
    homeless = sorted(x for x in stored - places if any(word in x for word in OWN_WORDS))
    _refuse(homeless, "tensors of it have no place", folder, base)
    for tensor_name, tensor in load_file(folder / WEIGHTS).items():
        check_finite(tensor_name, tensor)
    _refuse(sorted(places - stored), "places got no tensor", folder, base)


def _refuse(names: Collection[str], what: str, folder: Path, base: Path) -> None:
    if names:
        raise unfit(folder, base, f"{len(names)} {what}, the first is {next(iter(names))}")
