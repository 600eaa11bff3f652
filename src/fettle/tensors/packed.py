"""A compressed weight whose codes stay packed, for readers that lay them out themselves, such as the native kernels.

It is what `QuantizedTensor.from_state` makes of the storage `pack-quantized`, without unpacking the codes: a row is a
little-endian stream of bits (`packing.py`). Whether each code has a level is for the reader to find out, since only it
looks at every code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fettle.tensors.quantized import stored_shape, stored_shared, stored_zero_point
from fettle.tensors.scheme import Scheme

STORAGE = "pack-quantized"


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTensor:
    """Packed codes of a weight [out, in] and what they share.

    Attributes:
        words: int32 [out, ⌈in·bits/32⌉].
        scale: as `QuantizedTensor.scale`.
        zero_point: as `QuantizedTensor.zero_point`.
        scheme: what the others mean; without remainder, learned levels and tensor scale.
        columns: in.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    columns: int

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], scheme: Scheme) -> PackedTensor:
        """The weight whose `QuantizedTensor.to_state` this is; see `can_stay_packed`.

        Raises:
            CheckpointError: a tensor is missing, or has another type or shape than the scheme says.
        """
        shape = stored_shape(state, scheme, STORAGE)
        return cls(
            words=state["weight_packed"],
            scale=stored_shared(state, scheme, scheme.scale_shape(shape)).scale,
            zero_point=stored_zero_point(state, scheme, scheme.scale_shape(shape)[0]),
            scheme=scheme,
            columns=shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.words.shape[0], self.columns)

    def rows(self, span: slice | list[int]) -> PackedTensor:
        """Some of the rows."""
        whole = self.scheme.granularity == "tensor"
        return PackedTensor(
            words=self.words[span],
            scale=self.scale if whole else self.scale[span],
            zero_point=self.zero_point if whole or self.zero_point is None else self.zero_point[span],
            scheme=self.scheme,
            columns=self.columns,
        )


def can_stay_packed(scheme: object, storage: str) -> bool:
    """Whether codes and scales are all that a weight of this scheme is made of, and lie as `PackedTensor` has them."""
    return (
        isinstance(scheme, Scheme)
        and storage == STORAGE
        and scheme.grid.bits > 0
        and not scheme.grid.is_learned
        and scheme.remainder is None
        and not scheme.has_tensor_scale
    )
