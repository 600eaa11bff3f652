"""Vector codes that a gradient can move: a latent place for every weight among the entries, a scale for every group.

    value = entry nearest to u · scale        u [8] in units of the scale; scale = start · e^t

As in `soft_codes.py`: the gradient is passed straight through the rounding, both move by Adam's step, and values are
always those of the file. What differs is the cell of an entry, which has eight dimensions. A latent less than the
lattice's packing radius from its entry (√2/2 for E8, less by the ratio of a second stage) has no nearer one, so only
the others are looked up, and those only every fourth step, as they move little in one. A latent that
has left the table altogether, further from its entry than any point of E8 can be, stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fettle.methods.quantize.lattice_search import nearest_entries
from fettle.methods.quantize.soft_codes import Adam
from fettle.methods.quantize.vector_sweep import StoredScales, as_tensor, filled_up
from fettle.tensors.codebook import DIMENSION
from fettle.tensors.vectors import VectorScheme, VectorTensor, scaled, units_of

PACKING_RADIUS = 0.5**0.5  # of E8: nearer to an entry than this, no other is as near
COVERING_RADIUS = 1.0  # of E8: every point is as near as this to some entry of the whole lattice
START = 0.97  # of the packing radius: how far from its entry a latent may start
SEARCH_EVERY = 4  # steps


class SoftVectors:
    """One linear's vector codes in motion.

    Attributes:
        latent: float32 [out, whole eights], in units of the scale.
        log_scale: float32 [out, groups], t; zero at the start.
    """

    def __init__(self, start: VectorTensor, weight: Tensor) -> None:
        self.scheme, self._shape = start.scheme, start.shape
        self._scales = StoredScales(start.scheme, start.tensor_scale)
        self._base = start.scale if start.tensor_scale is None else start.scale * start.tensor_scale
        self.log_scale = torch.zeros_like(self._base)
        self._codes = start.codes.clone()
        self._units = units_of(start.codes, start.scheme)
        self._finest = min(start.scheme.ratios)
        self.latent = leaning_units(self._units, weight, self._base, self.scheme)
        self._latent_adam, self._scale_adam = Adam(self.latent.shape), Adam(self._base.shape)
        self._steps = 0

    def _scale(self) -> Tensor:
        """The scales as they multiply."""
        return self._scales.rounded(self._base * self.log_scale.exp())

    def values(self) -> Tensor:
        """The weight that these codes stand for, float32 [out, in], exactly as a file's reader computes it."""
        return scaled(self._units, self._scale(), self.scheme)[:, : self._shape[1]]

    def quantized(self) -> VectorTensor:
        """The codes as they are now."""
        return as_tensor(self._codes.clone(), self._scale(), self._shape, self.scheme, self._scales)

    def step_(self, gradient: Tensor, *, latent_rate: float, scale_rate: float) -> None:
        """One step down; rates in steps of the lattice for latents, relative for scales. gradient [out, in]."""
        slope = filled_up(gradient)
        if scale_rate > 0:
            pull = self._group_sums(slope * scaled(self._units, self._scale(), self.scheme))
            self.log_scale -= scale_rate * self._scale_adam.direction_(pull)
        if latent_rate <= 0:
            return
        inside = lengths(self.latent - self._units) <= COVERING_RADIUS * self._finest
        self.latent -= latent_rate * self._finest * self._latent_adam.direction_(by_eights(slope, inside.float()))
        self._steps += 1
        if self._steps % SEARCH_EVERY == 0:
            self._look_up_()

    def _look_up_(self) -> None:
        """The nearest entries of all latents that may have left their cell."""
        rows, eights = (lengths(self.latent - self._units) > PACKING_RADIUS * self._finest).nonzero(as_tuple=True)
        codes, units = nearest_entries(_eights(self.latent)[rows, eights], self.scheme)
        self._codes[rows, eights] = codes
        _eights(self._units)[rows, eights] = units

    def _group_sums(self, values: Tensor) -> Tensor:
        """Sums over the weights that share a scale: [out, columns] → [out, groups]."""
        width = self.scheme.group_size or values.shape[1]
        short = -values.shape[1] % width
        return pad(values, (0, short)).view(len(values), -1, width).sum(-1)


def leaning_units(units: Tensor, weight: Tensor, scale: Tensor, scheme: VectorScheme) -> Tensor:
    """Places of eights, [out, columns] in units of the scale, that lean from their entries to where the weight is.

    Args:
        units: float32 [out, columns], the entries.
        weight: [out, in], what the codes were made from.
        scale: float32 [out, groups], as it multiplies.
        scheme: of the codes.
    """
    offset = filled_up(weight) / scaled(torch.ones_like(units), scale, scheme) - units
    reach = START * PACKING_RADIUS * min(scheme.ratios)
    return units + by_eights(offset, reach / lengths(offset).clamp(min=reach))


def _eights(values: Tensor) -> Tensor:
    """A view [out, eights, 8] of [out, columns]."""
    return values.view(len(values), -1, DIMENSION)


def lengths(values: Tensor) -> Tensor:
    """Of each eight: [out, columns] → [out, eights]."""
    return _eights(values).square().sum(-1).sqrt_()


def by_eights(values: Tensor, factors: Tensor) -> Tensor:
    """Values [out, columns] times the factor of their eight [out, eights]."""
    return (_eights(values) * factors.unsqueeze(-1)).flatten(1)
