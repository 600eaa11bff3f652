"""Tables of eight-dimensional entries that a code of 8 or 16 bits stands for: parts of the lattice E8, stored nowhere.

One code for eight weights at once beats eight codes for one each: at 2 bits a weight of a normal distribution the best
scalar levels leave 0.118 of the variance, these entries 0.09 (the limit of all codes is 0.0625). E8 packs eight
dimensions more densely than any other lattice, and its points follow from a rule, so that the table costs no byte in
the file; a learned table of 65,536 entries would be larger than every matrix of a small model.

    e8p       16 bits   ±(s · signs + ¼): s one of 256 patterns of halves, signs such that the entry's sum before the
                        shift is even (seven free, the eighth follows). QuIP#, Tseng et al. 2024, section 4.2,
                        https://arxiv.org/abs/2402.04396
    e8_roots   8 bits   the 240 shortest points of E8 and ±2 along each axis: what a second stage adds

    code of 16 bits     │ sign of all │ pattern, 8 bits │ seven signs │
    code of 8 bits      │ sign of all │ root or axis, 7 bits          │

Patterns are all 227 with squared length at most 10 and 29 of the 224 of length 12. The paper's 29 are a list of its
own; ours are of those without 5/2, every other one, which spreads them over the axes: codes are not exchangeable with
QuIP#'s. E8P in the paper has a bit for the shift by +¼ or -¼; the sign of everything says the same, as the patterns
come with all signs, and lets a search look at one half of the entries.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

DIMENSION = 8
PATTERNS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Codebook:
    """Entries of dimension eight, with each its negative.

    Attributes:
        name: "e8p" or "e8_roots".
        code_bits: 16 or 8.
        half: float32 [2**(code_bits-1), 8], the entries of the codes without the highest bit; with it they are
            negated.
    """

    name: str
    code_bits: int
    half: Tensor

    def entries(self, codes: Tensor) -> Tensor:
        """The entries that codes stand for: int [...] → float32 [..., 8]."""
        found = self.half[codes.long() & (len(self.half) - 1)]
        return torch.where((codes >= len(self.half)).unsqueeze(-1), -found, found)

    @property
    def energy(self) -> float:
        """Mean square of an entry's coordinates."""
        return float(self.half.square().mean(dtype=torch.float64))


@cache
def e8p() -> Codebook:
    """65,536 points of E8 + ¼ around the origin."""
    patterns = _patterns()  # [256, 8]
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=DIMENSION - 1)))  # [128, 7]
    signed = patterns.unsqueeze(1).repeat(1, len(signs), 1)  # [256, 128, 8]
    signed[..., :-1] *= signs
    odd = signed.sum(-1).remainder(2) != 0
    signed[..., -1] = torch.where(odd, -signed[..., -1], signed[..., -1])
    return Codebook(name="e8p", code_bits=16, half=signed.reshape(-1, DIMENSION) + 0.25)


@cache
def e8_roots() -> Codebook:
    """The 240 shortest points of E8, and eight axes both ways."""
    pairs = [
        (0.0,) * i + (1.0,) + (0.0,) * (j - i - 1) + (sign,) + (0.0,) * (DIMENSION - 1 - j)
        for i, j in itertools.combinations(range(DIMENSION), 2)
        for sign in (1.0, -1.0)
    ]  # 56, and their negatives
    halves = [
        (0.5, *signs) for signs in itertools.product((0.5, -0.5), repeat=DIMENSION - 1) if sum(signs) % 2 == 1.5
    ]  # 64 with an even number of minus signs
    axes = [tuple(2.0 * (i == j) for i in range(DIMENSION)) for j in range(DIMENSION)]
    return Codebook(name="e8_roots", code_bits=8, half=torch.tensor(pairs + halves + axes))


def _patterns() -> Tensor:
    """Absolute values of the entries before the shift, float32 [256, 8]."""
    halves = torch.tensor(list(itertools.product((0.5, 1.5, 2.5), repeat=DIMENSION)))
    length = halves.square().sum(1)
    short = halves[length <= 10]
    long = halves[(length == 12) & (halves.amax(1) < 2)]
    return torch.cat([short, long[::2], long[1:2]])
