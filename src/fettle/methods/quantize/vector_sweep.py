"""GPTQ's sweep over eight columns at a time: block LDL feedback, and codes and scales made better afterwards.

With the gram H = L·Lᵀ, L lower triangular in blocks of eight columns, taken from the last to the first, the error of
the outputs of a row is Σ_b ‖(t_b - v_b)·L_bb‖², where

    t_b = w_b + Σ_{j > b} (w_j - v_j) · L_jb · L_bb⁻¹

is what eight columns should be once the others have made up for what is missing. That is LDLQ of QuIP#
(Tseng et al. 2024, algorithm 4, https://arxiv.org/abs/2402.04396). Theirs takes the entry nearest to t_b;
ours the one with the least ‖(t_b - v_b)·L_bb‖², the error itself (`vector_search.py`), which needs no gram that a
rotation has made alike in all directions.

`refine` then goes over everything again: eight columns at a time the best code given all others (with the metric of
H_bb; coordinate descent, as the beam search of AQLM, Egiazarian et al. 2024, with a beam of one), and each scale by
least squares. No step raises the error.

Eights of columns with the strongest inputs go first; a short last one is filled with columns of zeros that cost nothing
but the damping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fettle.errors import NonFiniteError
from fettle.methods.quantize.sweep import DAMPING_TRIES
from fettle.methods.quantize.vector_search import EntrySearch
from fettle.tensors.codebook import DIMENSION
from fettle.tensors.vectors import VectorScheme, VectorTensor, scaled, units_of


@dataclass(frozen=True, kw_only=True)
class VectorFactor:
    """The damped gram of columns filled up to whole eights, and its factor.

    Attributes:
        gram: float32 [columns, columns], damping included.
        order: which eight is at each place; the last place is the first to be chosen.
        feedback: float32 [columns, columns], L_jb·L_bb⁻¹ for arranged columns.
        metrics: float32 [eights, 8, 8], L_bb by place.
    """

    gram: Tensor
    order: list[int]
    feedback: Tensor
    metrics: Tensor


def factorize_eights(gram: Tensor, damping: float) -> VectorFactor:
    """The factor of a gram [in, in] plus `damping`, a number that is added to its diagonal.

    Where rounding leaves that indefinite in this order of the columns, more is added.

    Raises:
        NonFiniteError: nothing helps: this is no gram.
    """
    columns = -(-len(gram) // DIMENSION) * DIMENSION
    filled = pad(gram.float(), (0, columns - len(gram), 0, columns - len(gram)))
    filled.diagonal().add_(damping)
    strength = filled.diagonal().reshape(-1, DIMENSION).sum(1)
    order = torch.argsort(strength, descending=True, stable=True).flip(0)
    arranged = (order.unsqueeze(1) * DIMENSION + torch.arange(DIMENSION)).flatten()
    lower, info = torch.linalg.cholesky_ex(filled[arranged.unsqueeze(1), arranged])
    for attempt in range(DAMPING_TRIES):
        if int(info) == 0:
            break
        mean = float(filled.diagonal().double().mean())
        filled.diagonal().add_(max(damping, 1e-6 * mean) * 10**attempt)
        lower, info = torch.linalg.cholesky_ex(filled[arranged.unsqueeze(1), arranged])
    if int(info):
        raise NonFiniteError("the gram is no matrix of products: not positive definite even with much damping")
    eights = len(order)
    blocks = lower.view(eights, DIMENSION, eights, DIMENSION)
    metrics = torch.stack([blocks[b, :, b] for b in range(eights)])
    feedback = torch.empty_like(lower)
    for b in range(eights):
        place = slice(b * DIMENSION, (b + 1) * DIMENSION)
        feedback[:, place] = torch.linalg.solve_triangular(metrics[b], lower[:, place], upper=False, left=False)
    return VectorFactor(gram=filled, order=order.tolist(), feedback=feedback, metrics=metrics)


class StoredScales:
    """Scales as the file will hold them.

    Attributes:
        unit: float32 [1], the tensor scale; None without.
    """

    def __init__(self, scheme: VectorScheme, unit: Tensor | None) -> None:
        self.unit, self._name, self._dtype = unit, scheme.scale_dtype, scheme.torch_scale_dtype
        limits = torch.finfo(self._dtype)
        small = self._dtype in (torch.float16, torch.float8_e4m3fn)  # they live on their subnormals
        self._smallest = limits.smallest_normal * (limits.eps if small else 1.0)
        self._top = limits.max

    @classmethod
    def up_to(cls, largest: Tensor, scheme: VectorScheme) -> StoredScales:
        """With a tensor scale, where the scheme has one, that lets small ones be as large as `largest`, a scalar."""
        if not scheme.has_tensor_scale:
            return cls(scheme, None)
        unit = largest.float() / torch.finfo(scheme.torch_scale_dtype).max
        tiny = torch.finfo(torch.float32).smallest_normal
        return cls(scheme, unit.clamp(min=tiny).reshape(1))

    def stored(self, wanted: Tensor) -> Tensor:
        """The scales of the file, as float32 and without the unit.

        Raises:
            NonFiniteError: a scale beyond its type.
        """
        plain = wanted if self.unit is None else (wanted / self.unit).clamp(max=self._top)
        found = plain.clamp(min=self._smallest).to(self._dtype).float()
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(
                f"a scale of {float(wanted.max()):.3g} is needed, which {self._name} cannot hold; set scale_dtype: "
                "bfloat16 or float32"
            )
        return found

    def rounded(self, wanted: Tensor) -> Tensor:
        """The scales as they multiply."""
        found = self.stored(wanted)
        return found if self.unit is None else found * self.unit


def filled_up(weight: Tensor) -> Tensor:
    """float32 [out, whole eights]: zeros beside the last column."""
    return pad(weight.float(), (0, -weight.shape[1] % DIMENSION))


def sweep(weight: Tensor, scale: Tensor, factor: VectorFactor, scheme: VectorScheme) -> Tensor:
    """Codes int32 [out, eights, stages] of a filled weight with given scales."""
    rows = len(weight)
    eights = len(factor.order)
    expanded = scaled(torch.ones_like(weight), scale, scheme).view(rows, eights, DIMENSION)
    arranged = weight.view(rows, eights, DIMENSION)[:, factor.order]
    errors = torch.zeros_like(arranged)
    codes = torch.empty(rows, eights, len(scheme.stages), dtype=torch.int32)
    for place in range(eights - 1, -1, -1):
        eight = factor.order[place]
        span = slice(place * DIMENSION, (place + 1) * DIMENSION)
        pulled = errors[:, place + 1 :].flatten(1) @ factor.feedback[span.stop :, span]
        target = arranged[:, place] + pulled
        search = EntrySearch(factor.metrics[place], scheme)
        chosen, units = search.nearest(target / expanded[:, eight])
        codes[:, eight] = chosen
        errors[:, place] = arranged[:, place] - units * expanded[:, eight]
    return codes


class Refinement:
    """Codes and scales of a filled weight in motion; no step raises tr(E·H·Eᵀ)."""

    def __init__(
        self, weight: Tensor, codes: Tensor, scale: Tensor, factor: VectorFactor, scheme: VectorScheme,
        scales: StoredScales,
    ) -> None:  # fmt: skip
        self.weight, self.codes, self.scale = weight, codes.clone(), scale.clone()
        self.gram, self.scheme, self.scales = factor.gram, scheme, scales
        self.units = units_of(codes, scheme)

    def errors(self) -> Tensor:
        """W - V, [out, columns]."""
        return self.weight - scaled(self.units, self.scale, self.scheme)

    def refit_scales_(self) -> bool:
        """Each scale by least squares, the others as they are; whether any changed."""
        width = self.scheme.group_size or self.weight.shape[1]
        errors, changed = self.errors(), False
        for group in range(self.scale.shape[1]):
            columns = slice(group * width, min((group + 1) * width, self.weight.shape[1]))
            units = self.units[:, columns]
            inner = self.gram[columns, columns]
            bend = (units @ inner).mul_(units).sum(1)
            slope = (errors @ self.gram[:, columns]).mul_(units).sum(1)
            old = self.scale[:, group]
            wanted = old + slope / bend
            wanted = self.scales.rounded(torch.where((bend > 0) & (wanted > 0), wanted, old))
            step = wanted - old
            better = step * (step * bend - 2 * slope) < 0
            step = torch.where(better, step, torch.zeros_like(step))
            self.scale[:, group] = torch.where(better, wanted, old)
            errors[:, columns] -= step.unsqueeze(1) * units
            changed |= bool(better.any())
        return changed

    def move_codes_(self) -> bool:
        """The best code of each eight, the others as they are; whether any changed."""
        scale = scaled(torch.ones_like(self.weight), self.scale, self.scheme)
        errors, changed = self.errors(), False
        for eight in range(self.weight.shape[1] // DIMENSION):
            span = slice(eight * DIMENSION, (eight + 1) * DIMENSION)
            metric = torch.linalg.cholesky(self.gram[span, span])
            gradient = errors @ self.gram[:, span]
            pulled = torch.cholesky_solve(gradient.T, metric).T
            old = self.units[:, span]
            target = old + pulled / scale[:, span]
            search = EntrySearch(metric, self.scheme)
            codes, units = search.nearest(target)
            better = search.cost(target - units) < search.cost(target - old)
            chosen = better.unsqueeze(1)
            self.codes[:, eight] = torch.where(chosen, codes, self.codes[:, eight])
            step = torch.where(chosen, units - old, torch.zeros_like(old))
            errors[:, span] -= step * scale[:, span]
            self.units[:, span] = torch.where(chosen, units, old)
            changed |= bool(better.any())
        return changed


def as_tensor(
    codes: Tensor, scale: Tensor, shape: tuple[int, int], scheme: VectorScheme, scales: StoredScales
) -> VectorTensor:
    """The weight with these codes and effective scales."""
    return VectorTensor(codes=codes, scale=scales.stored(scale), shape=shape, scheme=scheme, tensor_scale=scales.unit)
