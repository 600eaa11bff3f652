"""Low-rank correction: two thin matrices beside the codes make up for most of what rounding did to the outputs.

Zhang et al.: LQER, 2024, https://arxiv.org/abs/2402.02446; Liu et al.: EoRA, 2024, https://arxiv.org/abs/2410.21271.

    weight = values of the codes V + A·B        A [out, rank], B [rank, in]

For given codes, with E = W - V and G the gram of the inputs, the factors that leave the least tr((E - AB)·G·(E - AB)ᵀ)
are those of the truncated singular value decomposition of E·L, G = L·Lᵀ, with L⁻¹ behind the right one (EoRA; LQER
takes a diagonal L, and plain SVD is L = 1). Neither L nor its inverse is needed: with U the leading eigenvectors of
E·G·Eᵀ, which are the left singular vectors of E·L, the best product is the projection U·(Uᵀ·E), whatever the rank of G.
A matrix with more rows than columns is turned to its columns first, E = Q·R, and R·G·Rᵀ is decomposed.

A = U is rounded to its stored type; B = A⁺·E, the least squares for the rounded A, so that only B's own rounding is
felt. Each vector's largest entry is positive: the signs of an eigenvector are nobody's choice.

Codes and factors take turns (`rounds`, as in LoftQ, Li et al. 2023, https://arxiv.org/abs/2310.08659): codes of W - AB,
then factors of W - V. With GPTQ the codes after the first are not solved for anew, which measured no better than one
round; they and their scales move from where they are (`refine.py`). The best state of all is taken.

Cost: a round is the solver's plus out·in·min(out, in) and an eigendecomposition of the shorter side, about 9·side³.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.ranges import FUSED_MAXIMUM
from fettle.methods.quantize.solvers import Solver, SolverName
from fettle.tensors.factored import FactoredScheme, FactoredTensor
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class LowRankCorrection(GridFields):
    """Keeps two thin matrices beside the codes, fitted to the error that rounding makes in the outputs."""

    name: ClassVar[str] = "low_rank_correction"
    title: ClassVar[str] = "Low-rank correction"
    source: ClassVar[str] = "after LQER, Zhang et al. 2024, https://arxiv.org/abs/2402.02446, and EoRA"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    rank: int = field(default=8, metadata={"help": "width of the two matrices", "minimum": 1})
    solver: SolverName = field(default="gptq", metadata={"help": "what chooses the codes"})
    rounds: int = field(
        default=2, metadata={"help": "times that codes and then factors are solved for", "minimum": 1, "maximum": 100}
    )
    weighted: bool = field(
        default=True, metadata={"help": "fit the error of the outputs (EoRA); no: that of the weights, plain SVD"}
    )

    def needs(self) -> tuple[str, ...]:
        """What GPTQ needs; the gram where it weighs the error."""
        if self.solver == "gptq":
            return ("gram", "drift")
        return ("gram",) if self.weighted else ()

    def scheme(self, dtype: str) -> Scheme:
        """The codes' scheme with the factors beside them."""
        scheme = replace(super().scheme(dtype), remainder=FactoredScheme(rank=self.rank))
        scheme.validate()
        return scheme

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> QuantizedTensor:
        """Chooses codes and factors in turn, for weight [out, in]."""
        wanted = {name: statistics[name] for name in (*self.needs(), FUSED_MAXIMUM) if name in statistics}
        scheme = self.scheme(dtype)
        return low_rank_correction(
            weight, wanted, scheme, solver=self.solver, rounds=self.rounds, weighted=self.weighted
        )


def low_rank_correction(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    scheme: Scheme,
    *,
    solver: SolverName = "gptq",
    rounds: int = 2,
    weighted: bool = True,
) -> QuantizedTensor:
    """Codes and factors of weight [out, in] in `scheme`; pure.

    Raises:
        NonFiniteError: NaN or infinity in the weight or the gram, or a scale or a factor beyond its type.
    """
    solving = Solver(solver, weight, statistics, scheme)
    best = _with_factors(replace(solving.codes(solving.target), scheme=scheme), solving, weighted)
    for _ in range(rounds - 1):
        again = solving.again(best)
        best = solving.better(solving.better(best, again), _with_factors(again, solving, weighted))
    return best


def _with_factors(found: QuantizedTensor, solving: Solver, weighted: bool) -> QuantizedTensor:
    """The same codes with the best factors."""
    kept = found.scheme.remainder
    assert isinstance(kept, FactoredScheme)
    error = solving.target - replace(found, remainder=None).dequantize()
    gram = solving.gram if weighted else None
    left, _ = best_factors(error, kept.rank_of(found.shape), gram, damping=solving.damping)
    left = left.to(kept.dtype(found.scheme.torch_scale_dtype))
    right = fitted_right(error, left.float()).to(left.dtype)
    if not bool(torch.isfinite(right).all()):
        raise NonFiniteError(
            f"a factor is beyond {str(right.dtype).removeprefix('torch.')}; set scale_dtype: bfloat16 or float32"
        )
    return replace(found, remainder=FactoredTensor(left=left.contiguous(), right=right.contiguous()))


def best_factors(
    error: Tensor, rank: int, gram: Tensor | None = None, *, damping: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A [out, rank] with orthonormal columns and B [rank, in] with the least tr((E - AB)·H·(E - AB)ᵀ).

    Args:
        error: float32 E [out, in].
        rank: at most the shorter side.
        gram: float32 [in, in]; H is the gram with damping on its diagonal, or the identity for None.
        damping: see gram.
    """
    size = error.abs().max()
    scaled = error / size if float(size) > 0 else error  # squares of tiny weights would vanish
    tall = error.shape[0] > error.shape[1]
    basis, core = torch.linalg.qr(scaled) if tall else (None, scaled)
    weighed = core if gram is None else torch.addmm(core, core, gram, beta=damping)
    product = weighed @ core.T
    _, vectors = torch.linalg.eigh((product + product.T).div_(2))
    leading = vectors[:, -rank:].flip(1)
    left = leading if basis is None else basis @ leading
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    left = left * torch.where(largest < 0, -1.0, 1.0)
    return left, left.T @ error


def fitted_right(error: Tensor, left: Tensor) -> Tensor:
    """B [rank, in] = A⁺·E by the normal equations of an almost orthonormal A [out, rank]."""
    lower = torch.linalg.cholesky(left.T @ left)
    return torch.cholesky_solve(left.T @ error, lower)
