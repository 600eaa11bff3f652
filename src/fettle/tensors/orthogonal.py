"""Orthogonal matrices that are cheap to multiply with: randomized Hadamard matrices for any width.

    R = diag(s) · blockdiag(H, …, H) / √order          s: random signs;  H Hᵀ = order · I, entries ±1

A Hadamard matrix spreads one large channel evenly over all of its block, and the signs keep a common mean from falling
into a single channel (QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, section 3). H is a Kronecker
product of a base and a power of two:

    width = blocks · base · 2ᵏ      2ᵏ by additions and subtractions in pairs (Sylvester 1867)
                                    base 12, 20, 28, 36, 60, … by quadratic residues of a prime (Paley 1933): q + 1 for
                                    q = 3 (mod 4), 2·(q + 1) for q = 1 (mod 4)

`hadamard_order` takes the largest order that divides the width: 576 is one block of 576 = 36 · 16, 896 one of 28 · 32;
a width such as 44 is one of 44; where there is none, as in 6 = 3 · 2, blocks of a smaller order stand side by side.

`centred` matrices also leave the vector of ones where it is: R followed by the reflection that takes 1ᵀR back to 1ᵀ.
They commute with taking away a mean, so with a LayerNorm too.

Cost of n channels: n · (k + base) additions a row, in float64: a row's result is then the same, to the last bit of its
own type, whichever rows it stands among.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**21  # numbers worked on at once: 16 MB in float64
LARGEST_BASE = 512  # a base is multiplied with as a matrix


@dataclass(frozen=True, kw_only=True)
class Orthogonal:
    """An orthogonal matrix R [width, width], never written out; see the module docstring. Make it with `randomized`."""

    signs: Tensor  # float64 [width]
    order: int
    centred: bool

    @property
    def width(self) -> int:
        """How many channels it mixes."""
        return self.signs.shape[0]

    def describe(self) -> str:
        """`Hadamard 64`, `3 blocks of Hadamard 2`."""
        blocks = self.width // self.order
        return f"Hadamard {self.order}" if blocks == 1 else f"{blocks} blocks of Hadamard {self.order}"

    def apply(self, rows: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`rows` [..., k · width] · diag(scale) → each run of `width` columns times R, in `dtype` or the rows' own.

        Args:
            rows: any floating-point type; not changed.
            scale: by what the columns are multiplied first, [k · width]; None for 1.
            dtype: of the result.
        """
        columns = rows.shape[-1]
        flat = rows.reshape(-1, columns)
        result = torch.empty(flat.shape, dtype=dtype or rows.dtype)
        step = max(1, CHUNK // columns)
        for start in range(0, len(flat), step):
            part = flat[start : start + step].double()
            if scale is not None:
                part = part * scale.double()
            result[start : start + step] = self._multiply(part.reshape(-1, self.width)).reshape(-1, columns)
        return result.reshape(rows.shape)

    def undo(self, rows: Tensor) -> Tensor:
        """`rows` [..., width] · Rᵀ, in their own type: what `apply` was given."""
        flat = rows.reshape(-1, self.width).double()
        if (normal := self._normal()) is not None:
            flat = _reflected(flat, normal)
        turned = _hadamard_product(flat, self.order, transposed=True) * self.signs
        return turned.to(rows.dtype).reshape(rows.shape)

    def matrix(self) -> Tensor:
        """R, float64 [width, width]: for small widths, and for looking at."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))

    def _multiply(self, rows: Tensor) -> Tensor:
        """float64 [n, width] · R."""
        mixed, normal = _hadamard_product(rows * self.signs, self.order), self._normal()
        return mixed if normal is None else _reflected(mixed, normal)

    def _normal(self) -> Tensor | None:
        """The difference, of length 1, of the directions of 1ᵀR before and after the reflection; None where there is
        none.
        """
        if not self.centred:
            return None
        unit = torch.full((self.width,), 1 / math.sqrt(self.width), dtype=torch.float64)
        normal = _hadamard_product((unit * self.signs).unsqueeze(0), self.order)[0] - unit
        length = normal.norm()
        return normal / length if length > 1e-12 else None


def randomized(width: int, generator: torch.Generator, *, centred: bool = False) -> Orthogonal:
    """A randomized Hadamard matrix for `width` channels, its signs drawn from `generator`."""
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int64) * 2 - 1
    return Orthogonal(signs=signs.double(), order=hadamard_order(width), centred=centred)


def hadamard_order(width: int) -> int:
    """The largest order of a Hadamard matrix known here that divides `width`; 1 for odd widths."""
    divisors = (width // count for count in range(1, width + 1) if width % count == 0)
    return next(order for order in divisors if _base(order) is not None)


def hadamard_matrix(order: int) -> Tensor:
    """H with entries ±1 and H Hᵀ = order · I, float64 [order, order]; the order is one of `hadamard_order`'s."""
    return _hadamard_product(torch.eye(order, dtype=torch.float64), order) * math.sqrt(order)


def _base(order: int) -> int | None:
    """The base of an order base · 2ᵏ: 1, or the smallest that Paley's constructions give; None where they give none."""
    odd = order >> ((order & -order).bit_length() - 1)
    if odd == 1:
        return 1
    candidates = (odd << k for k in range(2, 10))
    return next((b for b in candidates if b <= LARGEST_BASE and order % b == 0 and _paley_prime(b) is not None), None)


def _paley_prime(order: int) -> int | None:
    """The prime q with order = q + 1, q = 3 (mod 4), or order = 2·(q + 1), q = 1 (mod 4)."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and _is_prime(half) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _paley(order: int) -> Tensor:
    """Paley's Hadamard matrix, float64 [order, order]."""
    prime = _paley_prime(order)
    assert prime is not None, order
    squares = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, prime)]).double()
    places = torch.arange(prime)
    size = prime + 1
    border = torch.zeros(size, size, dtype=torch.float64)
    border[0, 1:] = 1
    border[1:, 1:] = character[(places.unsqueeze(1) - places) % prime]
    eye = torch.eye(size, dtype=torch.float64)
    if prime % 4 == 3:  # I + a skew matrix
        border[1:, 0] = -1
        return eye + border
    border[1:, 0] = 1  # symmetric: each entry becomes a block of two
    whole = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, whole) + torch.kron(eye, diagonal)


def _reflected(rows: Tensor, normal: Tensor) -> Tensor:
    return rows - (rows @ normal * 2).unsqueeze(1) * normal


def _hadamard_product(rows: Tensor, order: int, *, transposed: bool = False) -> Tensor:
    """float64 [n, k · order] times blockdiag(H, …) / √order, or its transpose."""
    base = _base(order)
    assert base is not None, order
    mixed = rows.reshape(-1, base, order // base)  # [n · k, base, 2ᵏ]
    if base > 1:
        mixed = torch.einsum("nbp,cb->ncp" if transposed else "nbp,bc->ncp", mixed, _paley(base))
    half = 1
    while half < order // base:
        pairs = mixed.reshape(-1, base, order // base // (2 * half), 2, half)
        first, second = pairs.unbind(3)
        mixed = torch.stack((first + second, first - second), dim=3)
        half *= 2
    return mixed.reshape(rows.shape) / math.sqrt(order)
