"""Completing one prompt with a model in memory: the engine with a single request.

`open_engine` is for serving; this is for a `LoadedModel` that is there already, and its cache is just as large as the
prompt and its completion.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from fettle.engine.contiguous_runner import ContiguousRunner
from fettle.engine.engine import Completion, Engine
from fettle.engine.prompts import Vocabulary
from fettle.engine.runner import Runner
from fettle.engine.sampler import Sampling
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.engine.torch_runner import TorchRunner, require_head
from fettle.errors import UsageError

if TYPE_CHECKING:
    from fettle.models.loading import LoadedModel

PAGE_SIZE = 16
LARGEST_CHUNK = 512


def complete(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The text that the model writes after `prompt`, without the prompt.

    Raises:
        UsageError: an empty prompt without a BOS token, a prompt longer than the model's context, an encoder, or a
            sampling value out of its range.
        NonFiniteError: the model's logits are not finite.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return complete_with(loaded, prompt, sampling, max_new_tokens=max_new_tokens).text


def complete_with(
    loaded: LoadedModel, prompt: str, sampling: Sampling, *, max_new_tokens: int, cache: Any = None
) -> Completion:
    """As `complete`, with the tokens and the reason for the end; `cache` as for `stream_completion`."""
    stream = stream_completion(loaded, prompt, sampling, max_new_tokens=max_new_tokens, cache=cache)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            assert isinstance(end.value, Completion)
            return end.value


def stream_completion(
    loaded: LoadedModel, prompt: str, sampling: Sampling, *, max_new_tokens: int, cache: Any = None
) -> Generator[str, None, Completion]:
    """Yields the text piece by piece as it is made; returns the `Completion`.

    `cache` is an empty key-value cache of transformers' kind, such as `models.kv_cache.quantized_cache`; None is an
    exact one, in pages.
    """
    sampling.check()
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if loaded.anatomy.causal:
        require_head(loaded)
    vocabulary = Vocabulary.of_loaded(loaded)
    ids = vocabulary.encode(prompt)
    longest = len(ids) + max_new_tokens
    if vocabulary.context_length is not None:
        longest = min(longest, vocabulary.context_length)
    runner: Runner
    if cache is None:
        runner = TorchRunner(loaded, pages=-(-longest // PAGE_SIZE), page_size=PAGE_SIZE)
    else:
        runner = ContiguousRunner(loaded, lambda: cache, tokens=longest)
    # A given cache is fed its prompt at once: what it keeps as codes depends on the pieces.
    chunk = LARGEST_CHUNK if cache is None else max(LARGEST_CHUNK, len(ids))
    engine = Engine(runner, vocabulary, SchedulerOptions(max_sequences=1, max_step_tokens=chunk))
    return engine.stream(Request(prompt=ids, sampling=sampling, max_tokens=max_new_tokens))
