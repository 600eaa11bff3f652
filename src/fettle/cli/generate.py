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
from fettle.engine.sampling import Sampling

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="How many tokens at most.", min=1)]


@with_flags(dataclass_flags(Sampling))
def run(
    model: Model,
    prompt: Prompt,
    max_new_tokens: Tokens = 64,
    device: Device = "cpu",
    generic: Generic = False,
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
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = api.load(model, device=device, generic=generic)
    began = time.monotonic()
    if json:
        made = complete_with(loaded, text, sampling, max_new_tokens=max_new_tokens)
        emit_json("generate", {"prompt": text, **dataclasses.asdict(made), "seconds": time.monotonic() - began})
        return
    print(text, end="", flush=True)
    for piece in stream_completion(loaded, text, sampling, max_new_tokens=max_new_tokens):
        print(piece, end="", flush=True)
    print()
