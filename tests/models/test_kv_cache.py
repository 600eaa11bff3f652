"""A cache of codes inside transformers' models: exact where nothing is coded, honest where something is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fettle
from fettle.errors import UsageError
from fettle.evaluate.cached import PIECE
from fettle.models.kv_cache import cache_bytes, quantized_cache
from fettle.models.loading import LoadedModel, load
from fettle.tensors.cache_codes import CacheScheme
from tests.parity.tiny_models import write_model


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load(tiny_llama)


def logits(loaded: LoadedModel, ids: torch.Tensor, scheme: CacheScheme | None, piece: int) -> torch.Tensor:
    cache, found = None if scheme is None else quantized_cache(loaded, scheme), []
    with torch.inference_mode():
        for start in range(0, len(ids), piece):
            output = loaded.model(input_ids=ids[None, start : start + piece], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0])
    assert cache.get_seq_length() == len(ids)
    return torch.cat(found)


IDS = torch.arange(3, 120)


def test_with_everything_recent_nothing_is_lost(loaded: LoadedModel) -> None:
    exact = logits(loaded, IDS, None, 7)
    coded = logits(loaded, IDS, CacheScheme(bits=2, residual=1000), 7)
    assert torch.allclose(coded, exact, atol=1e-5)


def test_tokens_see_codes_of_those_that_are_old_enough(loaded: LoadedModel) -> None:
    exact, coded = logits(loaded, IDS, None, 1), logits(loaded, IDS, CacheScheme(bits=2, group_size=8, residual=8), 1)
    # until 16 tokens are there none is coded; the 17th is the first that reads a code
    assert torch.allclose(coded[:16], exact[:16], atol=1e-5)
    assert not torch.allclose(coded[16], exact[16], atol=1e-3)


def test_more_bits_lose_less_and_take_more(loaded: LoadedModel) -> None:
    errors, sizes = [], []
    for bits in (2, 4, 8):
        scheme = CacheScheme(bits=bits, group_size=16, residual=0)
        errors.append(float((logits(loaded, IDS, scheme, 5) - logits(loaded, IDS, None, 5)).square().mean()))
        cache = quantized_cache(loaded, scheme)
        with torch.inference_mode():
            loaded.model(input_ids=IDS[None], past_key_values=cache)
        sizes.append(cache_bytes(cache))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0
    with torch.inference_mode():
        exact = cache_bytes(loaded.model(input_ids=IDS[None], use_cache=True).past_key_values)
    assert sizes[0] < sizes[1] < sizes[2] < exact
    assert exact == 2 * 2 * 2 * len(IDS) * 16 * 4  # keys and values, blocks, heads, tokens, width, float32


def test_what_cannot_be_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bits is 5"):
        quantized_cache(loaded, CacheScheme(bits=5))
    with pytest.raises(UsageError, match="one sequence, got 2"), torch.inference_mode():
        loaded.model(input_ids=torch.stack([IDS, IDS]), past_key_values=quantized_cache(loaded, CacheScheme()))
    write_model("gemma2", tmp_path)
    with pytest.raises(UsageError, match="sliding windows"):
        quantized_cache(load(tmp_path), CacheScheme())


def test_the_cost_on_a_text(tiny_llama: Path, text_file: Path) -> None:
    found = [
        fettle.evaluate_cache(
            tiny_llama, CacheScheme(bits=bits, group_size=16, residual=0), text=text_file, length=128, max_tokens=512
        )
        for bits in (2, 8)
    ]
    assert found[0].kl_mean > 10 * found[1].kl_mean > 0
    assert found[0].exact_perplexity == found[1].exact_perplexity
    assert found[0].cache_bytes < found[1].cache_bytes < found[1].exact_bytes
    assert found[0].window_tokens == 128 > PIECE
    # an exact cache gives what the streaming evaluation gives
    plain = fettle.evaluate(tiny_llama, text=text_file, length=128, max_tokens=512)
    assert found[0].exact_perplexity == pytest.approx(plain.perplexity, rel=1e-4)
