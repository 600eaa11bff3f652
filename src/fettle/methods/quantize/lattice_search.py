"""The entry nearest to a point in the plain sense, found by rounding instead of by looking at all entries.

The 65,536 entries of `e8p` are ±(h + ¼) with h of halves whose sum is even: two shifted copies of the lattice D8, cut
off at a length. The point of such a copy nearest to x takes eight roundings (Conway & Sloane 1982, "Fast quantizing and
decoding algorithms for lattice quantizers and codes"): round every coordinate, and where the sum comes out odd, take
the second choice of the coordinate that was rounded the furthest. The nearer of the two copies' points is the nearest
entry, if the table has it; a point beyond the table's edge is looked up among all (`vector_search.py`).

Two stages take turns as there. Only for errors that count alike in all directions: a sweep that weighs them by the
inputs has to look at every entry.

Cost: some thirty passes over the targets, and a look at all entries (50 µs) for each that lies beyond the edge:
together a seventh of what looking alone takes, with normal weights.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fettle.methods.quantize.vector_search import ROUNDS, nearest_of_all
from fettle.tensors.codebook import DIMENSION, Codebook, e8p
from fettle.tensors.vectors import VectorScheme

SIGNS = DIMENSION - 1  # stored; the last follows from the sum
SIZES = 4  # of a coordinate of a pattern: 1/2, 3/2, 5/2, 7/2


def nearest_entries(targets: Tensor, scheme: VectorScheme) -> tuple[Tensor, Tensor]:
    """Codes int32 [n, stages] and their entries' sums float32 [n, 8], for targets [n, 8] in units of the scale."""
    books, ratios = scheme.stages, scheme.ratios
    codes = torch.zeros(len(targets), len(books), dtype=torch.int32)
    entries = targets.new_zeros(len(books), *targets.shape)
    for _ in range(ROUNDS if len(books) > 1 else 1):
        for stage, (book, ratio) in enumerate(zip(books, ratios, strict=True)):
            left = (targets - (entries.sum(0) - entries[stage])) / ratio
            codes[:, stage] = _nearest(left, book)
            entries[stage] = ratio * book.entries(codes[:, stage])
    return codes, entries.sum(0)


def _nearest(targets: Tensor, book: Codebook) -> Tensor:
    """Codes int32 [n] of the entries nearest to targets [n, 8]."""
    if book.name != e8p().name:
        return nearest_of_all(targets, book)
    plus, minus = _nearest_halves(targets - 0.25), _nearest_halves(-targets - 0.25)
    further = (targets - 0.25 - plus).square().sum(1) > (targets + 0.25 + minus).square().sum(1)
    halves = torch.where(further.unsqueeze(1), minus, plus)
    found = _codes_of(halves)
    codes = torch.where(further, found + 2 ** (book.code_bits - 1), found).int()
    beyond = (found < 0).nonzero().flatten()
    codes[beyond] = nearest_of_all(targets[beyond], book)
    return codes


def _nearest_halves(points: Tensor) -> Tensor:
    """The nearest points [n, 8] with coordinates of halves (… -1/2, 1/2, 3/2 …) and an even sum."""
    rounded = (points - 0.5).round() + 0.5
    off = points - rounded
    worst = off.abs().argmax(1, keepdim=True)
    second = torch.where(off.gather(1, worst) < 0, -1.0, 1.0)
    odd = rounded.sum(1, keepdim=True).remainder(2) != 0
    return rounded.scatter_add(1, worst, second * odd)


def _codes_of(halves: Tensor) -> Tensor:
    """The codes int64 [n], without the sign of all, of points [n, 8] of halves; -1 where the table has none."""
    sizes = halves.abs() - 0.5
    inside = sizes.amax(1) < SIZES
    keys = (sizes.clamp(max=SIZES - 1) @ _weights(SIZES, DIMENSION)).long()
    pattern = _pattern_of()[keys]
    signs = ((halves[:, :SIGNS] < 0).float() @ _weights(2, SIGNS)).long()
    return torch.where(inside & (pattern >= 0), pattern * 2**SIGNS + signs, -1)


def _weights(base: int, count: int) -> Tensor:
    """What digits count in a number, the first most."""
    return torch.tensor([float(base**place) for place in reversed(range(count))])


@cache
def _pattern_of() -> Tensor:
    """Number of the pattern, int64 [4^8], by the sizes of its coordinates; -1 for those that are none."""
    first = e8p().half[:: 2**SIGNS] - 0.25  # every pattern with all stored signs positive
    keys = ((first.abs() - 0.5) @ _weights(SIZES, DIMENSION)).long()
    table = torch.full((SIZES**DIMENSION,), -1, dtype=torch.int64)
    table[keys] = torch.arange(len(first))
    return table
