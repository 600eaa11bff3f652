"""What a coded key-value cache costs: the same model with an exact cache and with codes, on long contexts.

Every window is fed in pieces, so that later tokens read earlier ones from their codes, as they would while a text is
generated. Both runs use the same weights: the difference is the cache's alone. Figures are of all predicted tokens; the
last quarter of each window, whose past is longest, is also told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.evaluate.quality import TokenMeasures, concatenate, measure_tokens

PIECE = 32  # tokens fed at once


@dataclass(frozen=True, kw_only=True)
class CacheEvaluation:
    """A coded cache against an exact one; KL in nats a token.

    Attributes:
        kl_late: of the last quarter of every window.
        cache_bytes, exact_bytes: of both caches at the end of the longest window.
    """

    kl_mean: float
    kl_late: float
    perplexity: float
    exact_perplexity: float
    top1_agreement: float
    tokens: int
    window_tokens: int
    cache_bytes: int
    exact_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def evaluate_cache(
    model: Any, windows: list[Tensor], make_cache: Callable[[], Any], count_bytes: Callable[[Any], int]
) -> CacheEvaluation:
    """Runs every window twice.

    Args:
        model: a transformers model.
        windows: int64 [tokens] each.
        make_cache: an empty coded cache.
        count_bytes: of a cache, coded or exact.

    Raises:
        UsageError: no window of two tokens.
    """
    windows = [ids for ids in windows if len(ids) > 1]
    if not windows:
        raise UsageError("there are no windows of at least two tokens to measure; give a longer text")
    parts: list[TokenMeasures] = []
    late: list[Tensor] = []
    sizes = (0, 0)
    for ids in windows:
        coded, cache = _logits(model, ids, make_cache())
        exact, plain = _logits(model, ids, None)
        measures = measure_tokens(coded[:-1], ids[1:], exact[:-1])
        assert measures.kl is not None
        parts.append(measures)
        late.append(measures.kl[-max(1, len(measures.kl) // 4) :])
        sizes = max(sizes, (count_bytes(cache), count_bytes(plain)), key=lambda pair: pair[1])
    whole = concatenate(parts)
    assert whole.kl is not None and whole.agreement is not None and whole.reference_loss is not None
    return CacheEvaluation(
        kl_mean=float(whole.kl.mean()),
        kl_late=float(torch.cat(late).mean()),
        perplexity=float(whole.loss.mean().exp()),
        exact_perplexity=float(whole.reference_loss.mean().exp()),
        top1_agreement=float(whole.agreement.double().mean()),
        tokens=len(whole.loss),
        window_tokens=max(len(ids) for ids in windows),
        cache_bytes=sizes[0],
        exact_bytes=sizes[1],
    )


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [tokens, vocab] of one window fed in pieces, and the cache behind it."""
    found = []
    for start in range(0, len(ids), PIECE):
        output = model(input_ids=ids[start : start + PIECE].unsqueeze(0), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0].float())
    return torch.cat(found), cache
