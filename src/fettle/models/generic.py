"""An anatomy for an architecture without a table: every matrix under the numbered blocks, alike.

What: among the tensor names, the longest numbered list (`something.0.`, `something.1.`, …) is taken to be the blocks;
every 2-D `.weight` in it is a linear of role `linear` that shares its inputs with nobody. Routers are left out: they
decide, they do not compute, and a slightly wrong decision costs more than a slightly wrong matrix. Embeddings lie
outside the blocks and stay as they are.

What this cannot know: which matrices read the same inputs (so their statistics are collected apart), matrices in 3-D
parameters, and transposed storage. A table in families.py is the better way; this is the way without one.
"""

from __future__ import annotations

import re

from fettle.errors import CheckpointError
from fettle.models.checkpoint import Checkpoint
from fettle.models.families import DIMENSIONS
from fettle.models.parts import CODE_SUFFIXES, Anatomy, Block, Linear, Slot

_NUMBERED = re.compile(r"^(.*?)\.(\d{1,9})\.")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
_HEADS = ("lm_head", "embed_out", "output")
MOST_SHARED_BLOCKS = 1000  # a few architectures run the same block many times
_ROUTERS = re.compile(r"(^|[._])(router|gate|shared_expert_gate)$")


def read_generic(checkpoint: Checkpoint) -> Anatomy:
    """The anatomy of any checkpoint with a numbered list of blocks; raises `CheckpointError` when there is none."""
    lists: dict[str, set[int]] = {}
    for name in checkpoint.entries:
        if match := _NUMBERED.match(name):
            lists.setdefault(match[1], set()).add(int(match[2]))
    if not lists:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor lies under a numbered list of blocks, so --generic finds none."
        )
    _refuse_a_tower(checkpoint)
    stem = max(sorted(lists), key=lambda key: len(lists[key]))
    inside: dict[int, list[str]] = {}
    for name in checkpoint.entries:
        match = _NUMBERED.match(name)
        if match and match[1] == stem:
            inside.setdefault(int(match[2]), []).append(name)
    blocks = tuple(_block(checkpoint, stem, index, names) for index, names in sorted(inside.items()))
    in_blocks = {name for names in inside.values() for name in names}
    outside = tuple(sorted(set(checkpoint.entries) - in_blocks))
    embedding = _named(checkpoint, outside, _EMBEDDINGS, "embedding")
    head = _named(checkpoint, outside, _HEADS, "head")
    tied = head is None and embedding is not None and bool(checkpoint.config.get("tie_word_embeddings", False))
    parameters = {name: name for name in checkpoint.entries}
    return Anatomy("generic", blocks, embedding, head, tied, outside, _is_causal(checkpoint), parameters)


def _refuse_a_tower(checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` for more blocks than there are tensors: the module tree would never be built."""
    for key in DIMENSIONS["layers"]:
        count = checkpoint.config.get(key)
        if isinstance(count, int) and count > max(MOST_SHARED_BLOCKS, len(checkpoint.entries)):
            raise CheckpointError(
                f"config.json says {key} = {count}, and the files hold {len(checkpoint.entries)} tensors in all. Check "
                f"that config.json belongs to these weights. ({checkpoint.folder})"
            )


def _is_causal(checkpoint: Checkpoint) -> bool:
    names = checkpoint.config.get("architectures") or [""]
    return str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))


def _block(checkpoint: Checkpoint, stem: str, index: int, names: list[str]) -> Block:
    linears = []
    for name in sorted(names):
        module = _module(name)
        if module is None or _ROUTERS.search(module):
            continue
        shape = _shape(checkpoint, module)
        if shape is not None:
            slot = Slot(f"{module}.weight")
            linears.append(Linear(module, f"{module}.weight", "linear", index, shape, slot, module))
    return Block(index, f"{stem}.{index}", tuple(linears), tuple(sorted(names)))


def _module(name: str) -> str | None:
    for suffix in (".weight", ".weight_packed", ".weight_values"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def _shape(checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
    """[out, in] of a matrix, dense or stored as codes; None if it is no matrix."""
    entry = checkpoint.entries.get(f"{module}.weight")
    if entry is not None:
        return (entry.shape[0], entry.shape[1]) if len(entry.shape) == 2 else None
    if f"{module}.weight_shape" not in checkpoint.entries:
        return None
    told = checkpoint.read(f"{module}.weight_shape").flatten().tolist()
    if len(told) != 2:
        raise CheckpointError(f"tensor {f'{module}.weight_shape'!r} holds {len(told)} numbers; a shape has two.")
    return int(told[0]), int(told[1])


def _named(checkpoint: Checkpoint, outside: tuple[str, ...], words: tuple[str, ...], role: str) -> Linear | None:
    for name in outside:
        module = _module(name)
        beside = tuple(suffix for suffix in CODE_SUFFIXES if suffix not in (".weight_packed", ".weight_values"))
        if module is None or name.endswith(beside) or module.rsplit(".", 1)[-1] not in words:
            continue
        shape = _shape(checkpoint, module)
        if shape is not None:
            return Linear(module, f"{module}.weight", role, None, shape, Slot(f"{module}.weight"), f"{module}.inputs")
    return None
