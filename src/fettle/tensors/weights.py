"""What a stored weight may be: a code for each weight, one for eight of them, or a mask with what stayed. Whoever only
stores, reads or counts one need not know which; all answer the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fettle.errors import RecipeError, unknown_word
from fettle.tensors.masked import MaskedScheme, MaskedTensor
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme
from fettle.tensors.vectors import VectorScheme, VectorTensor

WeightScheme = Scheme | VectorScheme | MaskedScheme
CompressedWeight = QuantizedTensor | VectorTensor | MaskedTensor


def scheme_from_dict(mapping: dict[str, Any]) -> WeightScheme:
    """The scheme whose `to_dict` this is; one without a pattern and a kind is that of a code for each weight.

    Raises:
        RecipeError: an unknown kind or key, or parts that do not fit together.
    """
    if "pattern" in mapping:
        return MaskedScheme.from_dict(mapping)
    kind = mapping.get("kind")
    if kind is None:
        return Scheme.from_dict(mapping)
    if kind != VectorScheme.kind:
        raise RecipeError(unknown_word("kind of scheme", str(kind), (VectorScheme.kind,)))
    return VectorScheme.from_dict(mapping)


def weight_from_state(state: Mapping[str, Tensor], scheme: WeightScheme, storage: str) -> CompressedWeight:
    """The weight whose `to_state` this is.

    Raises:
        CheckpointError: the tensors contradict the scheme.
        RecipeError: the storage cannot hold it.
    """
    if isinstance(scheme, VectorScheme):
        return VectorTensor.from_state(state, scheme, storage)
    if isinstance(scheme, MaskedScheme):
        return MaskedTensor.from_state(state, scheme, storage)
    return QuantizedTensor.from_state(state, scheme, storage)


def kernel_format(scheme: WeightScheme, storage: str) -> str:
    """The format that a kernel reads: vector codes and masks have their own, whatever storage a recipe prefers."""
    if isinstance(scheme, VectorScheme):
        return "vector-codes"
    return "masked" if isinstance(scheme, MaskedScheme) else storage
