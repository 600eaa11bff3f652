"""What a stored weight may be: codes with a scale, or a mask with what stayed. Whoever only stores, reads or counts
one need not know which; both answer the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fettle.tensors.masked import MaskedScheme, MaskedTensor
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme

WeightScheme = Scheme | MaskedScheme
CompressedWeight = QuantizedTensor | MaskedTensor


def scheme_from_dict(mapping: dict[str, Any]) -> WeightScheme:
    """The scheme whose `to_dict` this is.

    Raises:
        RecipeError: an unknown key, or parts that do not fit together.
    """
    return MaskedScheme.from_dict(mapping) if "pattern" in mapping else Scheme.from_dict(mapping)


def weight_from_state(state: Mapping[str, Tensor], scheme: WeightScheme, storage: str) -> CompressedWeight:
    """The weight whose `to_state` this is.

    Raises:
        CheckpointError: the tensors contradict the scheme.
        RecipeError: the storage cannot hold it.
    """
    if isinstance(scheme, MaskedScheme):
        return MaskedTensor.from_state(state, scheme, storage)
    return QuantizedTensor.from_state(state, scheme, storage)


def kernel_format(scheme: WeightScheme, storage: str) -> str:
    """The format that a kernel reads: a mask has one of its own, whatever the recipe's codes are stored as."""
    return "masked" if isinstance(scheme, MaskedScheme) else storage
