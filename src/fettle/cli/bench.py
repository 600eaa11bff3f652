"""`fettle bench`: how fast a model runs here, and how much of the machine that is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fettle.cli.options import Device, EngineName, Generic, Json, Model, ReportPath
from fettle.cli.output import console, emit_json, figure, show, size, table
from fettle.cli.recipe_choice import command_line
from fettle.engine.names import AUTO
from fettle.engine.speed_options import SpeedOptions
from fettle.errors import UsageError
from fettle.models.source import resolve
from fettle.report.atomic import require_writable
from fettle.report.speed import write_speed

if TYPE_CHECKING:
    from fettle.engine.speed import Measured

Threads = Annotated[int | None, typer.Option(metavar="N", help="How many threads compute; by default all.", min=1)]
Prompt = Annotated[int | None, typer.Option(metavar="N", help="Tokens of the prompt that is read.", min=1)]
New = Annotated[int, typer.Option(metavar="N", help="Tokens that every sequence decodes.", min=2)]
Batches = Annotated[str, typer.Option(metavar="N,N,…", help="How many sequences decode at the same time.")]
Repetitions = Annotated[int, typer.Option(metavar="N", help="How often everything is measured.", min=1)]
CacheBits = Annotated[
    int | None, typer.Option(metavar="8", help="Keep keys and values in 8 bits; of the native engine.")
]
DEFAULTS = SpeedOptions()


def run(
    model: Model,
    engine: EngineName = AUTO,
    threads: Threads = None,
    prompt_tokens: Prompt = None,
    new_tokens: New = DEFAULTS.new_tokens,
    batches: Batches = "1,4,8,16",
    repetitions: Repetitions = DEFAULTS.repetitions,
    device: Device = "cpu",
    generic: Generic = False,
    cache_bits: CacheBits = None,
    report: ReportPath = None,
    json: Json = False,
) -> None:
    """Measure how fast a model reads prompts and makes tokens, beside this machine's measured limits.

    \b
    Example:
      fettle bench demo --threads 2
    """
    together, cached = _batches(batches), _cache_type(cache_bits)
    if report is not None:
        require_writable(report)
    folder = resolve(model)  # before the imports, which take seconds
    from fettle.cli.engine_choice import settle_engine
    from fettle.engine.runners import ENGINES, RunnerOptions
    from fettle.engine.speed import measure_speed, shares, weights_read
    from fettle.models.anatomy import read_anatomy
    from fettle.models.checkpoint import Checkpoint
    from fettle.workers import available_threads

    opening = RunnerOptions(threads=threads or available_threads(), device=device, generic=generic)
    engine = settle_engine(engine, folder, opening)
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint, generic=generic)
    options = SpeedOptions(
        prompt_tokens=prompt_tokens or _usual_prompt(checkpoint.config), new_tokens=new_tokens, batches=together,
        repetitions=repetitions,
    )  # fmt: skip
    options.check()
    runner = ENGINES[engine](folder, replace(opening, cache_tokens=options.cache_tokens, cache_type=cached))
    cache_bytes = runner.shape.page_bytes / runner.shape.page_size
    read_bytes, weights = weights_read(checkpoint, anatomy)
    found = measure_speed(runner, options, threads=opening.threads)
    used_shares = shares(found, read_bytes, weights)
    document = {
        **{"model": model, "engine": engine, "threads": opening.threads, "device": device},
        "command_line": command_line(sys.argv[1:]),
        **{name: getattr(options, name) for name in ("prompt_tokens", "new_tokens", "repetitions")},
        "weight_bytes": read_bytes,
        "cache_bytes_per_token": cache_bytes,
        **{name: _median(value) for name, value in found.items()},
        **used_shares,
        "spread": {name: _spread(value) for name, value in found.items()},
        "report": report,
    }
    if report is not None:
        write_speed(report, document)
    if json:
        emit_json("bench", document)
        return
    title = f"{model}, {engine}, {opening.threads} threads, {device}"
    _print(title, options, found, used_shares, (read_bytes, cache_bytes))
    if report is not None:
        print(f"Report: {report}")


def _usual_prompt(config: Mapping[str, Any]) -> int:
    """Tokens of the prompt where nobody says how many: as many as the model's context takes beside a new one."""
    from fettle.models.config_file import context_length

    context = context_length(config)
    return DEFAULTS.prompt_tokens if context is None else min(DEFAULTS.prompt_tokens, context - 1)


def _cache_type(cache_bits: int | None) -> Literal["int8"] | None:
    if cache_bits not in (None, 8):
        raise UsageError(
            f"--cache-bits {cache_bits} is not timed here; allowed: 8, with the native engine. What 4 and 2 bits lose, "
            "fettle cache measures"
        )
    return None if cache_bits is None else "int8"


def _batches(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"--batches {text!r} is no list of numbers of sequences; give such as 1,4,8,16")
    return found


def _median(value: Measured | dict[int, Measured] | None) -> Any:
    if value is None:
        return None
    return {key: each.median for key, each in value.items()} if isinstance(value, dict) else value.median


def _spread(value: Measured | dict[int, Measured] | None) -> Any:
    if value is None:
        return None
    return {key: each.spread for key, each in value.items()} if isinstance(value, dict) else value.spread


def _print(
    title: str, options: SpeedOptions, found: dict[str, Any], used: dict[str, float | None], held: tuple[int, float]
) -> None:
    from fettle.engine.speed import ARITHMETIC

    def row(name: str, value: Measured, unit: str, scale: float = 1.0) -> tuple[str, str, str]:
        return name, f"{figure(value.median * scale)} {unit}", f"{value.spread:.0%}"

    rows = [
        row(f"prefill of {options.prompt_tokens} tokens", found["prefill_tokens_per_second"], "tokens/s"),
        row("time to the first token", found["time_to_first_token_seconds"], "ms", 1e3),
        *(
            row(f"decode, {batch} at once", value, "tokens/s")
            for batch, value in found["decode_tokens_per_second"].items()
        ),
        row("memory of this machine, read", found["read_bytes_per_second"], "GB/s", 1e-9),
        *(row(words, found[key], "Gop/s", 1e-9) for key, words in ARITHMETIC.items() if found[key] is not None),
        ("weights that a token needs", size(held[0]), ""),
        ("cache a token", size(round(held[1])), ""),
        ("share of the memory, decode, 1 at once", _share(used["memory_bandwidth_share"]), ""),
        ("share of the arithmetic, prefill", _share(used["arithmetic_share"]), ""),
    ]
    show(console(), table(title, ("", f"median of {options.repetitions}", "spread"), rows, right=(1, 2)))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
