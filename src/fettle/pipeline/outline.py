"""What `fettle inspect` prints: the anatomy of a checkpoint with sizes and schemes, read from config and headers
alone.
"""

from __future__ import annotations

from typing import Any

from fettle.models.anatomy import Anatomy, Linear
from fettle.models.checkpoint import Checkpoint
from fettle.models.storage import stored_schemes


def outline(checkpoint: Checkpoint, anatomy: Anatomy, name: str) -> dict[str, Any]:
    """Blocks, linears by role, shapes, bytes and schemes, as plain data."""
    stored = stored_schemes(checkpoint, anatomy)

    def describe(linear: Linear) -> dict[str, Any]:
        scheme = stored.get(linear.name)
        prefix = linear.weight_name.removesuffix("weight")
        owned = [e for n, e in checkpoint.entries.items() if n.startswith(prefix + "weight")]
        return {
            "name": linear.name,
            "role": linear.role,
            "shape": list(linear.shape),
            "bytes": sum(entry.nbytes for entry in owned),
            "scheme": scheme.scheme.describe() if scheme is not None else str(owned[0].dtype).removeprefix("torch."),
        }

    blocks = [
        {
            "index": block.index,
            "name": block.name,
            "bytes": sum(checkpoint.entries[tensor].nbytes for tensor in block.tensors),
            "linears": [describe(linear) for linear in block.linears],
        }
        for block in anatomy.blocks
    ]
    outside = [linear for linear in (anatomy.embedding, anatomy.head) if linear is not None]
    return {
        "model": name,
        "family": anatomy.family,
        "causal": anatomy.causal,
        "tied": anatomy.tied,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
        "blocks": blocks,
        "outside": [describe(linear) for linear in outside],
    }
