"""Where it hurts: the tokens with the largest KL in their context, and how KL is spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fettle.data.windows import Windows
from fettle.evaluate.quality import TokenMeasures

WORST = 20
CONTEXT_TOKENS = 24
EDGES = [0.0] + [10.0 ** (exponent / 4) for exponent in range(-24, 9)]  # 1e-6 … 100 nats, four bins a decade


def worst_tokens(measures: TokenMeasures, windows: Windows, tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens with the largest KL: what stood before them, what was right, what each model would have said."""
    assert measures.kl is not None and measures.predicted is not None and measures.reference_predicted is not None
    assert measures.reference_loss is not None
    origins = [(window, place) for window, ids in enumerate(windows.ids) for place in range(1, len(ids))]
    found = []
    for index in torch.argsort(measures.kl, descending=True, stable=True)[:WORST].tolist():
        window, place = origins[index]
        ids = windows.ids[window].tolist()

        def words(tokens: list[int]) -> str:
            return (
                str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
                if tokenizer is not None
                else str(tokens)
            )

        found.append(
            {
                "kl": measures.kl[index].item(),
                "context": words(ids[max(1, place - CONTEXT_TOKENS) : place]),
                "token": words([ids[place]]),
                "following": words(ids[place + 1 : place + 1 + CONTEXT_TOKENS // 2]),
                "predicted": words([int(measures.predicted[index])]),
                "reference_predicted": words([int(measures.reference_predicted[index])]),
                "probability": torch.exp(-measures.loss[index]).item(),
                "reference_probability": torch.exp(-measures.reference_loss[index]).item(),
            }
        )
    return found


def kl_histogram(kl: Tensor) -> dict[str, list[float]]:
    """Counts between logarithmic edges: {"edges": [bins + 1], "counts": [bins]}; the last bin has no upper end."""
    edges = torch.tensor(EDGES, dtype=torch.float64)
    bins = (torch.bucketize(kl, edges, right=True) - 1).clamp(0, len(EDGES) - 2)
    return {"edges": EDGES, "counts": torch.bincount(bins, minlength=len(EDGES) - 1).double().tolist()}
