"""Completing a prompt: prefill once, then one token a step against the model's own key-value cache.

    ids = [BOS] + tokens(prompt)      logits, cache = model(ids)      next → logits, cache = model([next], cache) …

BOS stands first because the models are trained and evaluated so; tokenizers that have none, or add it themselves, are
left alone. Text is decoded from all tokens so far and its new end is handed out, because one token may be half a
character. Cost: one forward of the prompt and one of a single token a step; the cache grows by a row a token.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from fettle.engine.sampling import Sampling, next_token
from fettle.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from fettle.models.anatomy import Anatomy
    from fettle.models.loading import LoadedModel

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders put for half a character


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came out of one prompt."""

    text: str  # without the prompt
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: Literal["end", "length", "context"]  # the model's own end; max_new_tokens; the model's context is full


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
    exact one.
    """
    sampling.check()
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if loaded.anatomy.causal and loaded.model.get_output_embeddings() is None:
        raise UsageError(
            f"{loaded.folder} is a {type(loaded.model).__name__}, which has no language-model head: it cannot complete "
            "text; give a model whose config.json names a class such as LlamaForCausalLM"
        )
    held = getattr(loaded.model.config, "max_position_embeddings", None)
    ids = checked_prompt(str(loaded.folder), loaded.anatomy, loaded.tokenizer, held, prompt)
    context = int(held or len(ids) + max_new_tokens)
    return _stream(loaded, ids, sampling, min(max_new_tokens, context - len(ids)), max_new_tokens, cache)


def checked_prompt(model: str, anatomy: Anatomy, tokenizer: Any, context: int | None, prompt: str) -> list[int]:
    """The token ids of a prompt that `model` can complete.

    Raises:
        UsageError: an encoder, a model without a tokenizer or with that of another model, or a prompt that cannot be.
    """
    if not anatomy.causal:
        raise UsageError(f"a {anatomy.family} model is an encoder: it cannot complete text")
    if tokenizer is None:
        raise UsageError(
            f"{model} has no tokenizer files, and a prompt can only be completed as tokens; add them to it"
        )
    ids = prompt_ids(tokenizer, require_text(prompt))
    if context and len(ids) >= context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens; this model's context holds {context}, one less for a prompt ({model})"
        )
    anatomy.require_rows(min(ids), max(ids))
    return ids


def require_text(prompt: str) -> str:
    """The prompt; raises UsageError for one that is no text, such as bytes of a command line that are not UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not UTF-8 text ({prompt[error.start]!r} at character {error.start}); convert it: iconv -t "
            "utf-8"
        ) from None
    return prompt


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt, BOS first where the tokenizer has one."""
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    if not ids:
        raise UsageError(
            "the prompt is empty and this tokenizer has no beginning-of-text token; give at least one word"
        )
    return ids


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The ids that end a text: the model's own and the tokenizer's."""
    ends: set[int] = set()
    for holder in (getattr(loaded.model, "generation_config", None), loaded.model.config, loaded.tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or [])
    return frozenset(ends)


def _stream(
    loaded: LoadedModel, ids: list[int], sampling: Sampling, limit: int, wanted: int, cache: Any
) -> Generator[str, None, Completion]:
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(loaded.model.parameters()).device
    ends = end_tokens(loaded)
    made: list[int] = []
    said = ""
    stopped: Literal["end", "length", "context"] = "length" if limit == wanted else "context"
    fed = torch.tensor([ids], device=device)  # [1, tokens]
    for _ in range(limit):
        with torch.inference_mode():
            output = loaded.model(input_ids=fed, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[0, -1], output.past_key_values  # [vocab]
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                f"the model's logits are not finite after {len(ids) + len(made)} tokens: it is damaged"
            )
        token = next_token(logits, sampling, generator)
        if token in ends:
            stopped = "end"
            break
        made.append(token)
        text = loaded.tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith(UNFINISHED):
            yield text[len(said) :]
            said = text
        fed = torch.tensor([[token]], device=device)
    text = loaded.tokenizer.decode(made, skip_special_tokens=True)
    if len(text) > len(said):
        yield text[len(said) :]
    return Completion(text=text, tokens=tuple(made), prompt_tokens=len(ids), stopped=stopped)
