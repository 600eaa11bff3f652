"""`fettle cache`: what a key-value cache kept as codes costs, on long contexts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fettle.cli import outlines
from fettle.cli.flags import dataclass_flags, given, with_flags
from fettle.cli.options import Device, Generic, Json, Model
from fettle.cli.output import console, emit_json, show, size, table
from fettle.cli.recipe_choice import command_line
from fettle.models.source import resolve

Text = Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text; without it the embedded held-out text.")]
Length = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens a window; by default the model's context.", min=2)
]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Use only the start of the text.", min=2)]


@with_flags(dataclass_flags(outlines.options("CacheScheme")))
def run(
    model: Model,
    text: Text = None,
    length: Length = None,
    max_tokens: MaxTokens = 8192,
    device: Device = "cpu",
    generic: Generic = False,
    json: Json = False,
    **fields: Any,
) -> None:
    """Measure a model whose key-value cache is kept in 8, 4 or 2 bits (keys by channel, values by token) against the
    same model with an exact cache, fed in pieces as while a text is generated.

    \b
    Example:
      fettle cache demo --bits 4 --group-size 32 --residual 32
    """
    options = outlines.options("CacheScheme")
    asked = given([f.name for f in dataclasses.fields(options)], fields, get_type_hints(options))
    resolve(model)  # before the imports, which take seconds
    from fettle import api
    from fettle.tensors.cache_codes import CacheScheme

    scheme = CacheScheme(**asked)
    if text is None:
        print("No --text given: the embedded held-out text (Python source code) is measured.", file=sys.stderr)
    found = api.evaluate_cache(
        model, scheme, text=text, length=length, max_tokens=max_tokens, device=device, generic=generic
    ).to_json()
    if json:
        emit_json(
            "cache",
            {"model": model, "scheme": dataclasses.asdict(scheme), "command_line": command_line(sys.argv[1:]), **found},
        )
        return
    rows = [
        ("perplexity", f"{found['exact_perplexity']:.4f}", f"{found['perplexity']:.4f}"),
        ("KL to the exact cache, nats a token", "", f"{found['kl_mean']:.5f}"),
        ("the same, last quarter of each window", "", f"{found['kl_late']:.5f}"),
        ("same first choice", "", f"{found['top1_agreement']:.2%}"),
        (f"bytes of {found['window_tokens']} tokens", size(found["exact_bytes"]), size(found["cache_bytes"])),
    ]
    show(console(), table(f"{found['tokens']:,} tokens", ("", "exact cache", "coded cache"), rows, right=(1, 2)))
