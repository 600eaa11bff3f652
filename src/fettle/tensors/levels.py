"""Grids by name: the tables of levels that the literature uses.

    uniform                 integers of 2 to 8 bits
    float                   e2m1 (4 bits, OCP MX), e2m3 (6), e4m3 (8, OCP FP8): sign, exponent, mantissa
    float_e5m2              8 bits with more range and fewer steps
    normal_float            equal shares of a normal distribution (QLoRA, Dettmers et al. 2023): 2 to 8 bits
    power_of_two            ±2^-k and zero (INQ, Zhou et al. 2017): a product is a shift
    additive_power_of_two   sums of two powers (APoT, Li et al. 2020): a product is two shifts
    ternary                 -1, 0, 1, in two bits a code
    binary                  -1, 1, in one bit a code

A level is a number; which number it is does not concern whoever stores or multiplies codes. Symmetric float grids have
two zeros in hardware and one here, so a code is the index of a level and no bit pattern; the standard's own formats are
converted where they are written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, get_args

from fettle.errors import RecipeError, unknown_word
from fettle.tensors.grid import MAX_BITS, Grid, from_levels, learned, uniform

GridName = Literal[
    "uniform",
    "float",
    "float_e5m2",
    "normal_float",
    "power_of_two",
    "additive_power_of_two",
    "ternary",
    "binary",
    "learned",
]
FLOAT_FIELDS = {4: (2, 1), 6: (2, 3), 8: (4, 3)}  # bits → exponent and mantissa bits of "float"
FIXED_BITS = {"float_e5m2": 8, "ternary": 2, "binary": 1}  # grids of one width only
DEFAULT_BITS = 4


def named(name: str, bits: int | None = None) -> Grid:
    """The grid of this name and width; without a width 4 bits, or the one width that it has.

    Raises:
        RecipeError: an unknown name, or a width that this grid does not come in.
    """
    if name not in get_args(GridName):
        raise RecipeError(unknown_word("grid", name, get_args(GridName)))
    if name == "uniform":
        return uniform(DEFAULT_BITS if bits is None else bits)
    own = FIXED_BITS.get(name)
    chosen = bits if bits is not None else own or DEFAULT_BITS
    allowed = (own,) if own else tuple(FLOAT_FIELDS) if name == "float" else _widths(name)
    if isinstance(chosen, bool) or chosen not in allowed:
        raise RecipeError(
            f"bits={bits!r} cannot be with grid {name!r}; allowed: {', '.join(map(str, allowed))}. Leave bits out for "
            f"{own or DEFAULT_BITS}"
        )
    if name == "learned":
        return learned(chosen)
    return from_levels(name, _LEVELS[name](chosen), bits=chosen)


def _widths(name: str) -> tuple[int, ...]:
    first = {"learned": 1, "additive_power_of_two": 3}.get(name, 2)
    return tuple(range(first, MAX_BITS + 1))


def float_levels(exponent_bits: int, mantissa_bits: int, *, top: int) -> tuple[float, ...]:
    """The finite numbers of a small float type with subnormals, one zero.

    Args:
        exponent_bits: bits of the exponent, with bias 2^(exponent_bits-1) - 1.
        mantissa_bits: bits of the mantissa.
        top: patterns (exponent and mantissa, as a number) from this one on are no finite numbers.

    >>> float_levels(2, 1, top=8)[-4:]
    (2.0, 3.0, 4.0, 6.0)
    """
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    positive = []
    for pattern in range(1, top):
        exponent, mantissa = divmod(pattern, steps)
        fraction = mantissa / steps + (1 if exponent else 0)
        positive.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return _mirrored(positive)


def normal_float_levels(bits: int) -> tuple[float, ...]:
    """NF4's construction for any width: quantiles of a normal, zero exact, both ends at ±1 (QLoRA, appendix E)."""
    count = 2**bits
    offset = 1 - (1 / (count - 1) + 1 / count) / 4  # between those of count - 1 and of count equal shares
    half = 2 ** (bits - 1)
    inverse = NormalDist().inv_cdf
    positive = [inverse(offset + (0.5 - offset) * i / half) for i in range(half)]  # one more than the negative side
    negative = [-inverse(offset + (0.5 - offset) * i / (half - 1)) for i in range(half - 1)]
    top = max(positive[0], -negative[0])
    return tuple(sorted(value / top for value in (*positive, 0.0, *negative)))


def power_of_two_levels(bits: int) -> tuple[float, ...]:
    """±1, ±1/2, ±1/4, … and zero: 2^bits - 1 levels."""
    return _mirrored([2.0**-k for k in range(2 ** (bits - 1) - 1)])


def additive_power_of_two_levels(bits: int) -> tuple[float, ...]:
    """APoT with two terms: sums of one power (or zero) from each of two interleaved sets, scaled to ±1.

    The magnitude has bits - 1 bits: the first term takes the larger half of them. Of the sums the distinct ones count.
    """
    first = (bits - 1 + 1) // 2
    second = bits - 1 - first
    one = [0.0] + [2.0 ** -(2 * i if second else i) for i in range(2**first - 1)]
    other = [0.0] + [2.0 ** -(2 * i + 1) for i in range(2**second - 1)]
    sums = sorted({a + b for a, b in itertools.product(one, other)} - {0.0})
    return _mirrored([value / sums[-1] for value in sums])


def _mirrored(positive: list[float]) -> tuple[float, ...]:
    return tuple(sorted({sign * value for value in positive for sign in (-1.0, 1.0)} | {0.0}))


_LEVELS: dict[str, Callable[[int], tuple[float, ...]]] = {
    # e4m3 gives its highest pattern to NaN; e2m1 and e2m3 have neither NaN nor infinity; e5m2 is an IEEE type
    "float": lambda bits: float_levels(*FLOAT_FIELDS[bits], top=2 ** (bits - 1) - (1 if bits == 8 else 0)),
    "float_e5m2": lambda bits: float_levels(5, 2, top=31 * 4),
    "normal_float": normal_float_levels,
    "power_of_two": power_of_two_levels,
    "additive_power_of_two": additive_power_of_two_levels,
    "ternary": lambda bits: (-1.0, 0.0, 1.0),
    "binary": lambda bits: (-1.0, 1.0),
}


def weight_sharing_ratio(weights: float, levels: int, bits: int = 32) -> float:
    """How much smaller n weights of b bits get when they share k levels: n·b / (n·log2 k + k·b).

    The formula of Deep Compression (Han et al. 2016, https://arxiv.org/abs/1510.00149). It leaves out padding and
    everything else that a file holds; `Scheme.stored_bytes` counts that.
    """
    return weights * bits / (weights * math.log2(levels) + levels * bits)
