"""Fake quantization with vector codes: a linear that computes with codes of eight weights each, and learns.

    forward    values = entries nearest to w / s, eight weights at a time, · s       the file's own arithmetic
    backward   ∂/∂w = ∂/∂values       while an eight is as near to its entry as lattice points are, 0 beyond
               ∂/∂t = Σ ∂/∂values · (values - w)       there, values beyond; s = start · e^t

As in `fake_quantization.py` (straight through; LSQ's equation 3), with the lattice's cell in the place of the gap
between two levels. PV-Tuning (Malinovskii et al. 2024, https://arxiv.org/abs/2405.14852) trains vector codes too, and
holds that straight-through estimates are worse than its alternation, which was not tried here.

An eight that is less than the packing radius from the entry that it started with keeps it, so that codes which a search
by the inputs' gram has chosen do not fall to plainly nearer ones before anything has learned. All others get the
nearest (`lattice_search.py`). So the codes follow from weights, scales and the start alone, and not from what steps
came between: a resumed training gives the same.

Cost: a rounding of every eight that has moved, a step; memory the weight twice, and its entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fettle.methods.quantize.lattice_search import nearest_entries
from fettle.methods.quantize.soft_vectors import COVERING_RADIUS, PACKING_RADIUS, by_eights, leaning_units, lengths
from fettle.methods.quantize.vector_sweep import StoredScales, as_tensor, filled_up
from fettle.methods.train.fake_quantization import FakeLinear
from fettle.tensors.codebook import DIMENSION
from fettle.tensors.vectors import VectorTensor, scaled, units_of


class _Nearest(torch.autograd.Function):
    """Weight and scale → given values of codes; gradients as the module says."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, values: Tensor, inside: Tensor, group: int) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(weight, values, inside)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, values, inside = ctx.saved_tensors
        gradient = gradients[0]
        pull = gradient * (values - by_eights(weight, inside))
        short = -pull.shape[1] % ctx.group
        sums = pad(pull, (0, short)).view(len(pull), -1, ctx.group).sum(-1)
        return by_eights(gradient, inside), sums, None, None, None


class FakeVectorLinear(FakeLinear[VectorTensor]):
    """One code for eight weights; `scheme` is what the codes mean."""

    def __init__(self, start: VectorTensor, bias: Tensor | None, original: Tensor | None = None) -> None:
        """`original` is the weight [out, in] that the codes were made from, to whose side the weights may lean."""
        base = start.scale if start.tensor_scale is None else start.scale * start.tensor_scale
        units = units_of(start.codes, start.scheme)
        latent = units if original is None else leaning_units(units, original, base, start.scheme)
        super().__init__(scaled(latent, base, start.scheme)[:, : start.shape[1]], bias)
        self.scheme, self._shape = start.scheme, start.shape
        kept = {"_base": base, "_codes": start.codes, "_units": units, "_tensor_scale": start.tensor_scale}
        for name, value in kept.items():
            self.register_buffer(name, value, persistent=False)  # where the weights go, they go
        self._base: Tensor
        self._codes: Tensor
        self._units: Tensor
        self._tensor_scale: Tensor | None
        self.log_scale = nn.Parameter(torch.zeros_like(base))

    @property
    def _scales(self) -> StoredScales:
        return StoredScales(self.scheme, self._tensor_scale)

    @property
    def level_gap(self) -> float:
        """A step of the finest lattice along one axis, on average."""
        return float(self._base.mean()) * min(self.scheme.ratios)

    def values(self) -> Tensor:
        """The weight that is computed with, float32 [out, in]; gradients as the module says."""
        scale = self._scale()
        latent = self._latent(scale)
        _, units = self._nearest(latent)
        inside = (lengths(latent - units) <= COVERING_RADIUS * min(self.scheme.ratios)).float()
        values = scaled(units, scale, self.scheme)
        group = self.scheme.group_size or values.shape[1]
        found: Tensor = _Nearest.apply(filled_up(self.weight), self.log_scale, values, inside, group)  # type: ignore[no-untyped-call]
        return found[:, : self._shape[1]]

    def quantized(self) -> VectorTensor:
        """The codes and scales of `values`."""
        scale = self._scale()
        codes, _ = self._nearest(self._latent(scale))
        return as_tensor(codes, scale, self._shape, self.scheme, self._scales)

    def _scale(self) -> Tensor:
        """The scales as they multiply, float32 [out, groups]."""
        assert self.log_scale is not None
        return self._scales.rounded(self._base * self.log_scale.detach().exp())

    def _latent(self, scale: Tensor) -> Tensor:
        """The weights in units of the scale, [out, columns]; what is beyond the row stays where it started."""
        latent = filled_up(self.weight.detach()) / scaled(torch.ones_like(self._units), scale, self.scheme)
        latent[:, self._shape[1] :] = self._units[:, self._shape[1] :]
        return latent

    def _nearest(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and units [out, columns] of such places."""
        left = lengths(latent - self._units) > PACKING_RADIUS * min(self.scheme.ratios)
        codes, units = self._codes.clone(), self._units.clone()
        moved = latent.view(*left.shape, DIMENSION)[left]
        found, entries = nearest_entries(moved.cpu(), self.scheme)
        codes[left] = found.to(moved.device)
        units.view(*left.shape, DIMENSION)[left] = entries.to(moved.device)
        return codes, units
