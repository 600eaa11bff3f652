"""`fettle generate`: completes a prompt, showing the text as it is made."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Annotated, Any, get_type_hints

import typer

from fettle import api
from fettle.cli.flags import dataclass_flags, given, with_flags
from fettle.cli.options import Device, Generic, Json, Model
from fettle.cli.output import emit_json
from fettle.engine.completion import complete_with, stream_completion
from fettle.engine.prompts import require_text
from fettle.engine.sampler import Sampling
from fettle.errors import UsageError
from fettle.models.kv_cache import quantized_cache
from fettle.tensors.cache_codes import CacheScheme

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="How many tokens at most.", min=1)]

CacheBits = Annotated[int | None, typer.Option(metavar="N", help="Keep old keys and values in 8, 4 or 2 bits.")]


@with_flags(dataclass_flags(Sampling))
def run(
    model: Model,
    prompt: Prompt,
    max_new_tokens: Tokens = 64,
    device: Device = "cpu",
    generic: Generic = False,
    cache_bits: CacheBits = None,
    json: Json = False,
    **fields: Any,
) -> None:
    """Complete a prompt with a model, compressed or not. Greedy unless --temperature is given.

    \b
    Example:
      fettle generate demo "def fibonacci(n):" --max-new-tokens 48
    """
    names = [f.name for f in dataclasses.fields(Sampling)]
    sampling = Sampling(**given(names, fields, get_type_hints(Sampling)))
    sampling.check()
    text = _standard_input() if prompt == "-" else require_text(prompt)
    if cache_bits is not None:
        CacheScheme(bits=cache_bits).check()
    loaded = api.load(model, device=device, generic=generic)
    cache = None if cache_bits is None else quantized_cache(loaded, CacheScheme(bits=cache_bits))
    began = time.monotonic()
    if json:
        made = complete_with(loaded, text, sampling, max_new_tokens=max_new_tokens, cache=cache)
        emit_json("generate", {"prompt": text, **dataclasses.asdict(made), "seconds": time.monotonic() - began})
        return
    print(text, end="", flush=True)
    for piece in stream_completion(loaded, text, sampling, max_new_tokens=max_new_tokens, cache=cache):
        print(piece, end="", flush=True)
    print()


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
