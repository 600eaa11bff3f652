"""The fields that every quantizer shares, and the scheme that they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.quantize.observers import Observer, observe
from fettle.tensors.activations import (
    LARGEST_BITS,
    MOST_OUTLIERS,
    SMALLEST_BITS,
    Activations,
    InputGranularity,
    InputGrid,
    InputScale,
)
from fettle.tensors.levels import GridName, named
from fettle.tensors.scheme import SCALE_DTYPES, Granularity, Scheme


@dataclass(frozen=True, kw_only=True)
class GridFields:
    """Recipe keys of a scheme."""

    bits: int | None = field(
        default=None,
        metadata={"help": "bits a code; none for 4, or the only width of the grid", "minimum": 1, "maximum": 8},
    )
    grid: GridName = field(default="uniform", metadata={"help": "what a code can stand for"})
    group_size: int | None = field(
        default=32, metadata={"help": "columns that share a scale; none for one scale a row", "minimum": 1}
    )
    granularity: Granularity | None = field(
        default=None,
        metadata={"help": "what shares a scale; none lets group_size say it, channel and tensor overrule it"},
    )
    asymmetric: bool = field(default=False, metadata={"help": "store a zero point with each scale"})
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu"] = field(
        default="auto",
        metadata={
            "help": "type of the scales; auto is the model's own, float32 where inputs are quantized; float8_e8m0fnu "
            "are powers of two (MX), float8_e4m3fn comes with a scale for the whole tensor (NV)"
        },
    )
    tensor_scale: Literal["fused", "own"] = field(
        default="fused",
        metadata={
            "help": "of NV scales: one for linears that runtimes multiply as one (query, key and value; gate and up), "
            "as the standard's tools have it, or each its own"
        },
    )

    activations: Literal["none", "dynamic", "static"] = field(
        default="none",
        metadata={
            "help": "quantize the linear's inputs as well: with a scale found on the spot, or with one that is stored"
        },
    )
    activation_bits: int = field(
        default=8, metadata={"help": "bits of an input's code", "minimum": SMALLEST_BITS, "maximum": LARGEST_BITS}
    )
    activation_granularity: InputGranularity | None = field(
        default=None,
        metadata={
            "help": "what shares an input scale; none for token where dynamic, tensor where static, and with 4-bit "
            "floats group, 32 inputs (MX), or beside NV weights tensor_group, 16 inputs and a stored scale (NV)"
        },
    )
    activation_grid: InputGrid = field(
        default="uniform",
        metadata={"help": "integers, or float for e4m3, with 4 bits e2m1: finer near zero, coarser far from it"},
    )
    observer: Observer = field(
        default="mse", metadata={"help": "how a static input scale is found on the calibration text"}
    )
    activation_asymmetric: bool = field(default=False, metadata={"help": "a zero point for the inputs, too"})
    activation_outliers: float = field(
        default=0.0,
        metadata={
            "help": "share of inputs that a static range leaves outside and that are multiplied in 16 bits; 0 clips",
            "minimum": 0.0, "maximum": MOST_OUTLIERS,
        },
    )  # fmt: skip

    def validate(self) -> None:
        """Checks that the fields fit together.

        Raises:
            RecipeError: groups without a size, a width that the grid does not have, a scheme that cannot be.
        """
        if self.granularity == "group" and self.group_size is None:
            raise RecipeError(
                "granularity: group needs a group_size, got none; allowed: integers from 1. Try group_size: 32"
            )
        if self.tensor_scale != "fused" and self.scale_dtype != "float8_e4m3fn":
            raise RecipeError(
                f"tensor_scale={self.tensor_scale!r} is about NV scales, and scale_dtype is {self.scale_dtype}; set "
                "scale_dtype: float8_e4m3fn, or leave it out"
            )
        for name in (
            "activation_bits",
            "activation_granularity",
            "activation_grid",
            "activation_asymmetric",
            "activation_outliers",
            "observer",
        ):
            default = next(found.default for found in fields(self) if found.name == name)
            if self.activations == "none" and getattr(self, name) != default:
                raise RecipeError(
                    f"{name} belongs to quantized inputs, and activations is none; set activations: dynamic or static, "
                    "or leave it out"
                )
        if self.activations == "dynamic" and self.observer != "mse":
            raise RecipeError(
                f"observer={self.observer!r} finds a stored scale, and a dynamic one is found on the spot; set "
                "activations: static, or leave it out"
            )
        if self.activation_outliers and self.observer != "mse":
            raise RecipeError(
                f"observer={self.observer!r} chooses a range, and activation_outliers={self.activation_outliers} says "
                "which: leave one of the two out"
            )
        self.scheme("float32")

    def scheme(self, dtype: str) -> Scheme:
        """The scheme; `dtype` is the model's own, for scale_dtype "auto"."""
        granularity = self.granularity or ("channel" if self.group_size is None else "group")
        if self.scale_dtype != "auto":
            dtype = self.scale_dtype
        elif self.activations != "none":
            dtype = "float32"  # what is measured is then what a product of integers gives: no value is rounded
        scheme = Scheme(
            grid=named(self.grid, self.bits),
            granularity=granularity,
            group_size=self.group_size if granularity == "group" else None,
            zero_point=self.asymmetric,
            scale_dtype=dtype if dtype in SCALE_DTYPES else "float32",
            activations=self._activations(),
        )
        scheme.validate()
        return scheme

    def input_scale(self, statistics: Mapping[str, Tensor], *, dtype: str) -> InputScale:
        """The stored scale of the inputs, as the observer finds it in the statistic "input_range"."""
        scheme = self.scheme(dtype)
        assert scheme.activations is not None
        return observe(statistics["input_range"], self.observer, scheme.activations, scheme.value_dtype)

    def _activations(self) -> Activations | None:
        if self.activations == "none":
            return None
        dynamic = self.activations == "dynamic"
        usual: InputGranularity = "token" if dynamic else "tensor"
        if self.activation_grid == "float" and self.activation_bits == 4:
            usual = "tensor_group" if self.scale_dtype == "float8_e4m3fn" else "group"
        return Activations(
            dynamic=dynamic,
            bits=self.activation_bits,
            granularity=self.activation_granularity or usual,
            zero_point=self.activation_asymmetric,
            grid=self.activation_grid,
            outliers=self.activation_outliers,
        )
