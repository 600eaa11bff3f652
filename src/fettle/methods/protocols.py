"""What a method is: a frozen dataclass whose fields are the recipe keys, the flags and the help text.

A method declares by name the statistics that it wants on its linear's inputs; the walk collects them. The rest of it is
a pure function on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme


class MatrixMethod(Protocol):
    """Compresses one weight at a time. Implementations are frozen, keyword-only dataclasses.

    Attributes:
        name: recipe key and flag value.
        title: a few words for people.
        source: the paper.
        statistics: names from `methods.statistics.STATISTICS` that `compress` may use; `needs` says which it wants.
        objective: what it minimises: "weight_error" (‖W - V‖²) or "output_error" (tr(ΔGΔᵀ), Δ = W - V).
        __dataclass_fields__: the recipe keys, as `dataclasses.fields` lists them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    statistics: ClassVar[tuple[str, ...]]
    objective: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def needs(self) -> tuple[str, ...]:
        """The statistics that this instance wants: what the class declares, less what a field turns off."""
        ...

    def validate(self) -> None:
        """Checks what the fields' own types and bounds cannot say; RecipeError where they do not fit together."""
        ...

    def scheme(self, dtype: str) -> Scheme:
        """How the result is stored; `dtype` is the model's own ("bfloat16"), for fields left to "auto"."""
        ...

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """Compresses weight [out, in]; touches neither it nor the statistics.

        Raises:
            NonFiniteError: NaN or infinity in the weight, a statistic or a scale.
        """
        ...
