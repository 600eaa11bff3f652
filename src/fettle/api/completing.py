"""Text that a training asks for: the engine writes on from prompts of ids, with a model that is in memory."""

from __future__ import annotations

from torch import Tensor, tensor

from fettle.engine.engine import Engine
from fettle.engine.sampler import Sampling
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.engine.torch_runner import TorchRunner
from fettle.errors import UsageError
from fettle.models.loading import LoadedModel

AT_ONCE, PAGE_SIZE = 16, 16


def complete(loaded: LoadedModel, prompts: Tensor, *, new_tokens: int, temperature: float, seed: int) -> Tensor:
    """int64 [n, tokens + new_tokens]: prompts int64 [n, tokens], written on by `loaded`.

    An end of text is a token like others. Row i draws with the seed `seed` + i, whatever runs beside it.

    Raises:
        UsageError: longer than the model's context, an encoder, or a model without a head.
    """
    length = prompts.shape[1] + new_tokens
    pages = -(-length // PAGE_SIZE) * min(AT_ONCE, len(prompts)) + 1
    runner = TorchRunner(loaded, pages=pages, page_size=PAGE_SIZE)
    held = runner.shape.context_length
    if held is not None and length > held:
        raise UsageError(f"windows of {length} tokens do not fit into the context of {loaded.folder}, {held} tokens")
    engine = Engine(runner, None, SchedulerOptions(max_sequences=AT_ONCE, reuse_prefixes=False))
    requests = [
        Request(
            prompt=tuple(row), max_tokens=new_tokens, min_tokens=new_tokens, ignore_end=True,
            sampling=Sampling(temperature=temperature, seed=seed + number),
        )
        for number, row in enumerate(prompts.tolist())
    ]  # fmt: skip
    return tensor(
        [request.prompt + made.tokens for request, made in zip(requests, engine.generate(requests), strict=True)]
    )
