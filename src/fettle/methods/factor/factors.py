"""Two thin matrices for one weight, and how thin: what every method of this room shares.

    weight [out, in] ≈ A·B      A [out, rank], B [rank, in]: rank · (out + in) numbers instead of out · in

The best product in a norm ‖(W - AB)·S‖ is the truncated singular value decomposition of W·S with S⁻¹ behind the right
factor (Eckart & Young 1936). Written as a projection, U·(Uᵀ·W) with the leading left singular vectors U of W·S, it
needs neither S⁻¹ nor an S of full rank. A = U is rounded to its stored type first, and B = A⁺·W is then the least
squares for the rounded A, in whatever norm.

How thin: `rank`; or `share`, the numbers stored over the weight's own; or `energy`, the least rank whose singular
values hold this share of the weight's squared norm. With `bits`, what the factors leave of the weight is stored in
codes as well (as with low_rank_correction, whose factors come last instead of first).

Cost: out·in·min(out, in) and an eigendecomposition of the shorter side, about 9·side³; `energy` one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.quantize.low_rank import fitted_right
from fettle.methods.quantize.ranges import NOT_FINITE
from fettle.methods.quantize.solvers import Solver
from fettle.tensors.factored import FactoredScheme, FactoredTensor
from fettle.tensors.grid import nothing, uniform
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import SCALE_DTYPES, Scheme

Factored = TypeVar("Factored", bound="FactorFields")
HALF = 0.5  # the share where nothing says how thin


@dataclass(frozen=True, kw_only=True)
class FactorFields:
    """Recipe keys of a factored weight."""

    name: ClassVar[str]

    rank: int | None = field(default=None, metadata={"help": "width of the two matrices", "minimum": 1})
    share: float | None = field(
        default=None,
        metadata={
            "help": "numbers in both matrices over those of the weight; 0.5 where nothing says it",
            "minimum": 1e-3,
            "maximum": 1.0,
        },
    )
    energy: float | None = field(
        default=None,
        metadata={"help": "share of the weight's squared norm that the rank keeps", "minimum": 1e-3, "maximum": 1.0},
    )
    bits: int | None = field(
        default=None, metadata={"help": "bits of codes for what the factors leave; none for nothing", "minimum": 2,
                                "maximum": 8}
    )  # fmt: skip
    group_size: int | None = field(
        default=32, metadata={"help": "columns that share a scale; none for one scale a row", "minimum": 1}
    )
    asymmetric: bool = field(default=False, metadata={"help": "store a zero point with each scale"})
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "type of the factors and scales; auto is the model's own"}
    )

    def validate(self) -> None:
        """At most one of rank, share and energy."""
        given = [name for name in ("rank", "share", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(
                f"{self.name}: {' and '.join(given)} both say how thin the factors are; give one of rank, "
                "share and energy, such as share: 0.5"
            )
        for name, default in (("group_size", 32), ("asymmetric", False)):
            if self.bits is None and getattr(self, name) != default:
                raise RecipeError(
                    f"{self.name}: {name} is about the codes of what the factors leave, and bits is none; set bits, "
                    "such as bits: 4, or leave it out"
                )

    def label(self) -> str:
        """svd-rank8, svd-0.5x or svd-energy0.9, and the bits of the rest."""
        shared = f"{self.share or HALF:g}x" if self.energy is None else f"energy{self.energy:g}"
        thin = shared if self.rank is None else f"rank{self.rank}"
        return f"{self.name}-{thin}" + (f"-{self.bits}bit" if self.bits is not None else "")

    @property
    def is_settled(self) -> bool:
        """Whether the rank is a number."""
        return self.rank is not None

    def settled(self: Factored, shape: tuple[int, int], read: Callable[[], Tensor]) -> Factored:
        """The method with a rank for a weight [out, in]."""
        if self.rank is not None:
            return self
        if self.energy is not None:
            rank = rank_of_energy(read(), self.energy)
        else:
            rank = math.floor((self.share or HALF) * shape[0] * shape[1] / (shape[0] + shape[1]))
        return replace(self, rank=max(1, rank), share=None, energy=None)

    def scheme(self, dtype: str) -> Scheme:
        """The factors' scheme, and the codes' under them; before the rank is settled, of rank 1."""
        wanted = dtype if self.scale_dtype == "auto" else self.scale_dtype
        grouped = self.bits is not None and self.group_size is not None
        scheme = Scheme(
            grid=nothing() if self.bits is None else uniform(self.bits),
            granularity="tensor" if self.bits is None else "group" if grouped else "channel",
            group_size=self.group_size if grouped else None,
            zero_point=self.asymmetric and self.bits is not None,
            scale_dtype=wanted if wanted in SCALE_DTYPES else "float32",
            remainder=FactoredScheme(rank=self.rank or 1),
        )
        scheme.validate()
        return scheme

    def factored(self, weight: Tensor, left: Tensor, statistics: Mapping[str, Tensor], dtype: str) -> QuantizedTensor:
        """Both factors for a given left one [out, rank], stored, with codes for the rest where they are asked for."""
        scheme = self.scheme(dtype)
        assert isinstance(scheme.remainder, FactoredScheme)
        wide = weight.float()
        left = left.to(scheme.remainder.dtype(scheme.torch_scale_dtype)).contiguous()
        right = fitted_right(wide, left.float()).to(left.dtype).contiguous()
        if not bool(torch.isfinite(right).all()):
            raise NonFiniteError(
                f"a factor is beyond {str(right.dtype).removeprefix('torch.')}; set scale_dtype: bfloat16 or float32"
            )
        factors = FactoredTensor(left=left, right=right)
        if self.bits is None:
            codes = torch.zeros(weight.shape, dtype=torch.uint8)
            scale = torch.ones(1, 1, dtype=scheme.value_dtype)
            return QuantizedTensor(codes=codes, scale=scale, zero_point=None, scheme=scheme, remainder=factors)
        rest = wide - left.float() @ right.float()
        gram = {name: value for name, value in statistics.items() if name == "gram"}
        solver = Solver("gptq" if gram else "round_to_nearest", rest, gram, scheme)
        return replace(solver.codes(rest), scheme=scheme, remainder=factors)


def checked(weight: Tensor) -> Tensor:
    """The weight in float32; NonFiniteError for NaN and infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(NOT_FINITE)
    return weight.float()


def rank_of_energy(weight: Tensor, energy: float) -> int:
    """The least rank whose singular values hold a share of the squared norm of weight [out, in]; at least 1."""
    wide = checked(weight).double()
    product = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    squares = torch.linalg.eigvalsh(product).flip(0).clamp_(min=0)
    held = torch.cumsum(squares, 0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(held))
