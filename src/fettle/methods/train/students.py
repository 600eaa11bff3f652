"""A shallower student made of the teacher's own blocks, as a folder.

DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108) starts from every other layer of its teacher, and so
starts near to it; which ones are kept is a layer map (`layer_maps.py`). Embedding, final norm and head are the
teacher's. What is written is an ordinary checkpoint with fewer blocks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fettle.errors import RecipeError, UsageError
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.families import DIMENSIONS
from fettle.models.reshaped_config import with_blocks
from fettle.models.storage import stored_schemes
from fettle.models.writer import copy_side_files, write_index, write_json, write_shard

_FIRST_NUMBER = re.compile(r"^(.*?)(?<![^.])(\d{1,9})\.")
METADATA = {"format": "pt"}


def write_student(teacher: Checkpoint, anatomy: Anatomy, kept: list[int], output: Path) -> None:
    """Writes the student of these blocks of the teacher.

    Raises:
        UsageError: the teacher is stored as codes.
        RecipeError: a config that does not say how many blocks there are, or blocks that know their number.
    """
    if stored_schemes(teacher, anatomy):
        raise UsageError(f"{teacher.folder} is compressed; a student is made of the layers of the original model")
    output.mkdir(parents=True, exist_ok=True)
    units = [{name: _renumbered(name, new) for name in anatomy.blocks[old].tensors} for new, old in enumerate(kept)]
    units.append({name: name for name in anatomy.tensors})
    shard_of, total = {}, 0
    for number, names in enumerate(units, start=1):
        shard = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        tensors = {new: teacher.read(old) for old, new in names.items()}
        write_shard(output, shard, tensors, METADATA)
        shard_of.update(dict.fromkeys(tensors, shard))
        total += sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    write_index(output, shard_of, total)
    copy_side_files(teacher.folder, output)
    write_json(output / "config.json", _shallower(teacher.config, kept))


def _renumbered(name: str, block: int) -> str:
    """The name with its first number, the block's, replaced."""
    match = _FIRST_NUMBER.match(name)
    assert match is not None, name
    return f"{match[1]}{block}.{name[match.end() :]}"


def _shallower(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The config with fewer layers; see `models/reshaped_config.py`."""
    keys = [key for key in DIMENSIONS["layers"] if isinstance(config.get(key), int)]
    if not keys:
        raise RecipeError(f"config.json says under none of {', '.join(DIMENSIONS['layers'])} how many layers there are")
    if config.get("scale_attn_by_inverse_layer_idx") and kept != list(range(len(kept))):
        raise RecipeError(
            "this model scales the attention of a block by the block's number (scale_attn_by_inverse_layer_idx), so a "
            "block in another place is another function; allowed: the first blocks alone"
        )
    return with_blocks(config, kept)
