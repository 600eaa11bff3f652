"""Rotary frequencies as plain numbers, taken from transformers' own module.

    angle[position, i] = position · frequencies[i]        cosine and sine are multiplied by `factor`

All scalings of the families (linear, llama3, yarn, longrope) end in a table of frequencies and a factor, and
transformers computes both when it builds the model; asking its module keeps the native decoder free of formulas.
Longrope has a second table for sequences that grow beyond the length of pretraining. NTK's "dynamic" has one for every
length and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fettle.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """What a model's positions turn by.

    Attributes:
        frequencies: float32 [half], of the short table.
        long_frequencies: float32 [half] for longrope; None otherwise.
        factor: of cosine and sine.
        switch: longrope: sequences longer than this take the long table; None otherwise.
    """

    frequencies: NDArray[np.float32]
    long_frequencies: NDArray[np.float32] | None
    factor: float
    switch: int | None


def read_rotary(tree: nn.Module) -> Rotary | None:
    """The rotary positions of a model built by `module_tree.build_tree`; None where it has none.

    Raises:
        UsageError: frequencies that depend on the length of every sequence.
    """
    turning = (m for m in tree.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor))
    module: Any = next(turning, None)
    if module is None:
        return None
    kind, config = str(getattr(module, "rope_type", "default")), module.config
    if "dynamic" in kind:
        raise UsageError(f"rotary scaling {kind!r} changes with every length, which the native engine lacks; use torch")
    long, switch = None, None
    if kind == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        switch = int(config.rope_parameters["original_max_position_embeddings"])
        long = _numbers(ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=switch + 1)[0])
    frequencies = _numbers(module.get_buffer("inv_freq"))
    return Rotary(frequencies=frequencies, long_frequencies=long, factor=float(module.attention_scaling), switch=switch)


def _numbers(values: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = values.detach().cpu().float().numpy()
    return found
