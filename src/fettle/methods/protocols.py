"""What a method is: a frozen dataclass whose fields are the recipe keys, the flags and the help text.

A method declares by name the statistics that it wants on its linear's inputs; the walk collects them. The rest of it is
a pure function on tensors.

    Described      name, title, source and fields: what recipes, flags and the report say of a method
    StepMethod     … and what it looks at
    MatrixMethod   weight [out, in], statistics → codes
    InputObserver  statistics → the stored scale of the inputs
    TensorScaled   which linears share one tensor scale
    SettledMethod  the weight → the same MatrixMethod with a scheme for it
    Tuner          what a MatrixMethod may bring along: a block's codes, and the block as a function → better codes
    Rescaler       what a MatrixMethod may bring along: weights that read the same inputs → factors for those inputs
    BasisMethod     for the whole model, before all others: other coordinates, the same function
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from fettle.tensors.activations import InputScale
from fettle.tensors.orthogonal import Orthogonal
from fettle.tensors.weights import CompressedWeight, WeightScheme

Codes = TypeVar("Codes", bound=CompressedWeight)


class Described(Protocol):
    """What every method says of itself. Implementations are frozen, keyword-only dataclasses.

    Attributes:
        name: recipe key and flag value.
        title: a few words for people.
        source: the paper.
        statistics: what it may look at; which words there are is said by each kind of method.
        objective: what the choice is judged by.
        __dataclass_fields__: the recipe keys, as `dataclasses.fields` lists them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    statistics: ClassVar[tuple[str, ...]]
    objective: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def validate(self) -> None:
        """Checks what the fields' own types and bounds cannot say; RecipeError where they do not fit together."""
        ...


class StepMethod(Described, Protocol):
    """A method that is a step of a recipe by itself and may look at less than its class declares."""

    def needs(self) -> tuple[str, ...]:
        """What this instance looks at: what the class declares, less what a field turns off; () for weights alone."""
        ...


class MatrixMethod(StepMethod, Protocol):
    """Compresses one weight at a time.

    Attributes:
        statistics: names from `methods.statistics.STATISTICS` that `compress` may use.
        objective: what it minimises: "weight_error" (‖W - V‖²) or "output_error" (tr(ΔGΔᵀ), Δ = W - V), or
            "first_order" (Σ |w·g| over what is pruned).
    """

    def scheme(self, dtype: str) -> WeightScheme:
        """How the result is stored; `dtype` is the model's own ("bfloat16"), for fields left to "auto"."""
        ...

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> CompressedWeight:
        """Compresses weight [out, in]; touches neither it nor the statistics.

        Raises:
            NonFiniteError: NaN or infinity in the weight, a statistic or a scale.
        """
        ...


@runtime_checkable
class InputObserver(Protocol):
    """A MatrixMethod whose scheme may have a stored scale for the inputs, which it finds once the weight is done."""

    def input_scale(self, statistics: Mapping[str, Tensor], *, dtype: str) -> InputScale:
        """The scale from the statistic "input_range"; asked only where the scheme stores one."""
        ...


@runtime_checkable
class TensorScaled(Protocol):
    """A MatrixMethod whose scheme may have a tensor scale. Where it says "fused", the walk gives it the largest
    |weight| of all linears that share one, among the statistics (`quantize.ranges.FUSED_MAXIMUM`).
    """

    tensor_scale: str


class BlockView(Protocol):
    """A block as a tuner sees it: a function of its weights that says how far its outputs are from the original's."""

    @property
    def windows(self) -> int:
        """How many windows of calibration inputs there are."""
        ...

    def error(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> float:
        """Mean squared error of the block's outputs with these weights [out, in], relative to the outputs' own size.

        The block reads what the compressed blocks before it give; what counts is the original block's output on the
        original inputs.
        """
        ...

    def gradient(self, weights: Mapping[str, Tensor], windows: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        """That error, and its gradient for each weight, float32 [out, in]."""
        ...


class Tuner(Protocol[Codes]):
    """Improves the codes of several linears of one block together; it is given those of its own method. Frozen, so that
    equal ones work on one set.
    """

    @property
    def most_weights(self) -> int | None:
        """A block with more weights to tune is left as it is, since nobody asked for the time; None: none is."""
        ...

    def tune(self, start: Mapping[str, Codes], weights: Mapping[str, Tensor], block: BlockView) -> dict[str, Codes]:
        """Codes for the same linears in the same schemes, with no larger error on the windows held back.

        Args:
            start: what the method chose for each linear alone.
            weights: the originals, float32 [out, in].
            block: the block with everything else in it as it is.
        """
        ...


@runtime_checkable
class BlockMethod(Protocol):
    """A MatrixMethod whose codes a tuner improves once all linears of the block have some."""

    def tuner(self) -> Tuner[Any] | None:
        """The tuner with this method's options; None where they turn it off."""
        ...


@runtime_checkable
class LabelledMethod(Protocol):
    """A MatrixMethod that a width of codes does not describe."""

    def label(self) -> str:
        """What one step with these fields is called in the name of a recipe: "svd-0.5x"."""
        ...


@runtime_checkable
class SettledMethod(Protocol):
    """A MatrixMethod whose scheme follows from the weight, such as a rank from a share or an energy: it is asked once,
    before bytes are counted.
    """

    @property
    def is_settled(self) -> bool:
        """Whether the scheme is the same for every weight."""
        ...

    def settled(self, shape: tuple[int, int], read: Callable[[], Tensor]) -> MatrixMethod:
        """The method with a scheme of its own for a weight [out, in]; `read` gives it, float32, where values count."""
        ...


class Rescaler(Protocol):
    """Chooses factors by which a group's columns are multiplied, and what feeds the group is divided: the model stays
    the same function, and its weights round better. Frozen, so that equal ones work on one group.

    Attributes:
        statistics: names from `methods.statistics.STATISTICS`, of what `factors` looks at.
    """

    statistics: ClassVar[tuple[str, ...]]

    def factors(
        self, weights: Sequence[Tensor], statistics: Mapping[str, Tensor], channels: Tensor, *, dtype: str
    ) -> Tensor:
        """A positive factor for each channel, float32 [channels]; pure.

        Args:
            weights: float32 [out, in], all that read these inputs.
            statistics: of these inputs.
            channels: int64 [in], the channel that each column reads; query heads that share a key-value head read the
                same ones.
            dtype: the model's own, as for `MatrixMethod.scheme`.
        """
        ...


@runtime_checkable
class RescalingMethod(Protocol):
    """A MatrixMethod that wants factors between its linears and what feeds them, before it sees a weight."""

    def rescaler(self) -> Rescaler:
        """The rescaler with this method's options."""
        ...


class BasisMethod(Described, Protocol):
    """Puts the whole model into other coordinates before any matrix is compressed; its function stays.

    Attributes:
        switch: the flag that asks for it beside other methods, without its dashes.
    """

    switch: ClassVar[str]

    def residual_map(self, width: int, *, centred: bool) -> Orthogonal | None:
        """R for a residual stream of this width, which leaves the ones where they are if `centred`; None: it stays."""
        ...

    def head_map(self, head_dim: int, block: int) -> Orthogonal | None:
        """R for the values of each head of a block; None: they stay."""
        ...
