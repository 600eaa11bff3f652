"""In which coordinates a written model's hidden states are.

A rotated model computes x·R where the original computes x (`methods/quantize/rotation.py`): the logits are the same,
and hidden states can be compared only in the same coordinates. The config of a rotated model names the rotation under
`fettle_basis`; loaders pass over that key, and need not know.
"""

from __future__ import annotations

from fettle.errors import CheckpointError, RecipeError
from fettle.methods.registry import BASES, basis_from_fields
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.rotated import BASIS_KEY
from fettle.tensors.orthogonal import Orthogonal


def residual_basis(checkpoint: Checkpoint, anatomy: Anatomy) -> Orthogonal | None:
    """R of the residual stream, as config.json says; None where the stream is as it was trained.

    Raises:
        CheckpointError: the key holds what cannot be; names it.
    """
    said = checkpoint.config.get(BASIS_KEY)
    if said is None:
        return None
    stream, embedding = anatomy.residual, anatomy.embedding
    try:
        if not isinstance(said, dict) or said.get("method") not in BASES or stream is None or embedding is None:
            raise RecipeError(f"it says {said!r} of this {anatomy.family} model; known: {', '.join(BASES)}")
        fields = {key: value for key, value in said.items() if key != "method"}
        return basis_from_fields(said["method"], fields).residual_map(embedding.shape[1], centred=stream.centred)
    except (RecipeError, TypeError) as error:  # TypeError: a method that is a list cannot be looked up
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: its {BASIS_KEY} cannot be understood ({error}). Copy the file "
            "again, or compress the model again."
        ) from error
