"""`fettle generate`: completes a prompt or holds a conversation, showing the text as it is made."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fettle.cli import outlines
from fettle.cli.flags import dataclass_flags, given, with_flags
from fettle.cli.options import Device, EngineName, Generic, Json, Model
from fettle.cli.output import emit_json
from fettle.engine.names import AUTO, ENGINE_NAMES
from fettle.errors import UsageError, unknown_word
from fettle.models.source import resolve

if TYPE_CHECKING:
    from fettle.engine.engine import Completion, Engine
    from fettle.engine.prompts import Vocabulary
    from fettle.engine.runners import RunnerOptions
    from fettle.engine.sampler import Sampling
    from fettle.engine.scheduler import SchedulerOptions
    from fettle.engine.sequence import Request
    from fettle.tensors.cache_codes import CacheScheme

Text = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.")]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="The same, as a flag.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="A conversation, by the model's template; without a prompt, a line a turn.")
]
Tokens = Annotated[
    int, typer.Option("--max-tokens", "--max-new-tokens", metavar="N", help="How many tokens at most.", min=1)
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text that ends it; may be given again.")]
Draft = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A smaller model that guesses tokens; lookup: the text itself.")
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="How many threads compute.", min=1)]
CacheBits = Annotated[
    int | None,
    typer.Option(metavar="N", help="Keep old keys and values in 8, 4 or 2 bits; with --engine native all in 8."),
]
CACHE_BITS = (8, 4, 2)
CHAT_TOKENS = 8192  # what the cache of a conversation holds, if the model's context is no shorter


@with_flags(dataclass_flags(outlines.options("Sampling")))
def run(
    model: Model,
    text: Text = None,
    prompt: Prompt = None,
    chat: Chat = False,
    max_tokens: Tokens = 64,
    stop: Stop = None,
    engine: EngineName = AUTO,
    draft: Draft = None,
    threads: Threads = None,
    device: Device = "cpu",
    generic: Generic = False,
    cache_bits: CacheBits = None,
    json: Json = False,
    **fields: Any,
) -> None:
    """Complete a prompt with a model, compressed or not. Greedy unless --temperature is given.

    \b
    Example:
      fettle generate demo --prompt "def fibonacci(n):" --max-tokens 48
    """
    sampling, asked = _sampling(fields), _asked(text, prompt, talks=chat and not json)
    _check_cache_bits(cache_bits, engine, draft)
    folder = resolve(model)  # before the imports, which take seconds
    from fettle.engine.prompts import Vocabulary
    from fettle.engine.runners import RunnerOptions
    from fettle.engine.sequence import Request

    vocabulary = dataclasses.replace(Vocabulary.of_folder(folder, generic=generic), model=model)
    if chat:
        vocabulary.require_chat()
    ids: tuple[int, ...] = ()
    if asked is not None:
        ids = vocabulary.encode_chat([_said(asked)]) if chat else vocabulary.encode(asked)
    wanted = Request(
        prompt=ids or (0,), sampling=sampling, max_tokens=max_tokens, stop=tuple(stop or ()), logprobs=None
    )
    longest = len(ids) + max_tokens if ids else CHAT_TOKENS
    options = RunnerOptions(
        cache_tokens=min(longest, vocabulary.context_length or longest), threads=threads, device=device, generic=generic
    )
    opened = _opened(model, engine, draft, cache_bits, options, vocabulary, len(ids))
    if asked is None:
        _talk(opened, vocabulary, wanted)
    elif json:
        began = time.monotonic()
        made = opened.generate([wanted])[0]
        emit_json("generate", {"prompt": asked, **_plain(made, opened), "seconds": time.monotonic() - began})
    else:
        print("" if chat else asked, end="", flush=True)
        _show(opened.stream(wanted))


def _sampling(fields: dict[str, Any]) -> Sampling:
    """How tokens are drawn.

    Raises:
        UsageError: a value out of its range.
    """
    from fettle.engine.sampler import Sampling

    names = [f.name for f in dataclasses.fields(Sampling)]
    sampling = Sampling(**given(names, fields, get_type_hints(Sampling)))
    sampling.check()
    return sampling


def _check_cache_bits(bits: int | None, engine: str, draft: str | None) -> None:
    """Raises UsageError for an engine that there is not, and for a coded cache that the engine cannot keep."""
    if engine not in ENGINE_NAMES:
        raise UsageError(unknown_word("engine", engine, ENGINE_NAMES))
    if bits is None:
        return
    if bits not in CACHE_BITS:
        raise UsageError(f"--cache-bits {bits}; keys and values are kept in {', '.join(map(str, CACHE_BITS))} bits")
    if engine == "native":
        if bits != 8:
            raise UsageError(f"--cache-bits {bits} goes with --engine torch; the native engine has codes of 8 bits")
    elif draft is not None:
        raise UsageError(
            f"--cache-bits {bits} goes without --draft, since such a cache forgets nothing; leave one of them out, or "
            "take --engine native with 8 bits"
        )


def _opened(
    model: str, engine: str, draft: str | None, cache_bits: int | None, options: RunnerOptions, vocabulary: Vocabulary,
    prompt_tokens: int,
) -> Engine:  # fmt: skip
    """The engine that the flags mean."""
    from fettle.cli.engine_choice import settle_engine
    from fettle.engine.runners import open_engine
    from fettle.tensors.cache_codes import CacheScheme

    if cache_bits is not None and engine != "native":
        return _coded(model, CacheScheme(bits=cache_bits), options, vocabulary, prompt_tokens)
    if cache_bits is not None:
        options = dataclasses.replace(options, cache_type="int8")
    chosen = settle_engine(engine, resolve(model), options)
    return open_engine(model, engine=chosen, runner=options, scheduler=_alone(), draft=draft)


def _asked(text: str | None, prompt: str | None, *, talks: bool) -> str | None:
    """The prompt, wherever it was given; None where a conversation is read line by line."""
    if text is not None and prompt is not None:
        raise UsageError("the prompt is given twice, as PROMPT and as --prompt; give one of them")
    asked = prompt if text is None else text
    if asked is None and not talks:
        raise UsageError(
            "there is no prompt; give PROMPT, --prompt TEXT, - for standard input, or --chat alone to talk"
        )
    return _standard_input() if asked == "-" else asked


def _alone(chunk: int = 512) -> SchedulerOptions:
    from fettle.engine.scheduler import SchedulerOptions

    return SchedulerOptions(max_sequences=1, max_step_tokens=chunk)


def _coded(
    model: str, scheme: CacheScheme, options: RunnerOptions, vocabulary: Vocabulary, prompt_tokens: int
) -> Engine:
    """An engine whose cache keeps old tokens as codes; a prompt is read at once, so it is exact to itself."""
    from fettle import api
    from fettle.engine.contiguous_runner import ContiguousRunner
    from fettle.engine.engine import Engine
    from fettle.models.kv_cache import quantized_cache
    from fettle.models.loading import LoadedModel

    loaded = api.load(model, device=options.device, generic=options.generic)
    if not isinstance(loaded, LoadedModel):
        raise UsageError(f"{model} is an image classifier and generates no text; see: fettle evaluate {model}")
    runner = ContiguousRunner(
        loaded,
        lambda: quantized_cache(loaded, scheme),
        tokens=options.cache_tokens or CHAT_TOKENS,
        threads=options.threads,
    )
    return Engine(runner, vocabulary, _alone(max(512, prompt_tokens)))


def _plain(made: Completion, engine: Engine) -> dict[str, Any]:
    return {
        "text": made.text,
        "tokens": made.tokens,
        "token_ids": made.tokens,
        "prompt_tokens": made.prompt_tokens,
        "stopped": made.stopped,
        "prefill_tokens_per_second": made.prefill_tokens_per_second,
        "decode_tokens_per_second": made.decode_tokens_per_second,
        "guessed_tokens": 0 if engine.payoff is None else engine.payoff.guessed,
        "accepted_tokens": 0 if engine.payoff is None else engine.payoff.accepted,
    }


def _said(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def _talk(engine: Engine, vocabulary: Vocabulary, wanted: Request) -> None:
    """A turn a line of standard input; what was said before is still in the cache."""
    messages: list[dict[str, str]] = []
    for line in sys.stdin:
        if line.strip():
            messages.append(_said(line.strip()))
            answer = dataclasses.replace(wanted, prompt=vocabulary.encode_chat(messages))
            messages.append(_said(_show(engine.stream(answer)).text, "assistant"))


def _show(stream: Generator[str, None, Completion]) -> Completion:
    """Prints the pieces as they come and a line's end behind them."""
    while True:
        try:
            print(next(stream), end="", flush=True)
        except StopIteration as end:
            print()
            made: Completion = end.value
            return made


def _standard_input() -> str:
    """All of standard input, as UTF-8 text whatever the terminal's own encoding is."""
    if sys.stdin is None:
        raise UsageError("the prompt is -, and standard input is closed; give the prompt itself, or pipe it in")
    raw = getattr(sys.stdin, "buffer", None)
    try:
        return str(sys.stdin.read()) if raw is None else raw.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); convert it: "
            "iconv -f <its encoding> -t utf-8"
        ) from None
