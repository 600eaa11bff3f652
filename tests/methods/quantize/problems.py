"""Small compression problems that several tests share: correlated inputs and a weight."""

from __future__ import annotations

import torch
from torch import Tensor


def correlated_gram(in_features: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """The gram of `correlated_inputs`."""
    inputs = correlated_inputs(in_features, seed, tokens)
    return inputs.T @ inputs


def correlated_inputs(in_features: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """[tokens, in] with a few strong directions and strengths that differ by column."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(max(2, in_features // 4), in_features, generator=generator)
    inputs = torch.randn(tokens, len(strong), generator=generator) @ strong
    inputs += 0.3 * torch.randn(tokens, in_features, generator=generator)
    inputs *= torch.rand(in_features, generator=generator) * 2 + 0.1
    return inputs


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """Normal weights with heavy tails."""
    generator = torch.Generator().manual_seed(seed + 1000)
    weight = torch.randn(out_features, in_features, generator=generator)
    return 0.05 * weight * (1 + weight.square() / 4)
