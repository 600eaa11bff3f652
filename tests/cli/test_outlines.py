"""The outlines are the methods themselves as far as flags go, and an answer that needs no torch imports none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest

from fettle.cli import outlines
from fettle.cli.flags import method_flags
from fettle.cli.main import main
from fettle.engine.names import AUTO, ENGINE_NAMES
from fettle.engine.runners import ENGINES
from fettle.engine.sampler import Sampling
from fettle.methods.field_values import require_possible
from fettle.methods.registry import BASES, EVERY_METHOD
from fettle.methods.train import TRAIN_METHODS
from fettle.pipeline.recipe import CalibrationOptions
from fettle.tensors.cache_codes import CACHE_BITS, CacheScheme

REAL: dict[str, Any] = {
    **EVERY_METHOD,
    **BASES,
    **TRAIN_METHODS,
    **{cls.__name__: cls for cls in (CalibrationOptions, Sampling, CacheScheme)},
}


def outlined() -> dict[str, Any]:
    options = {name: outlines.options(name) for name in ("CalibrationOptions", "Sampling", "CacheScheme")}
    return {**outlines.every_method(), **outlines.bases(), **outlines.train_methods(), **options}


def test_every_method_has_an_outline_in_the_registrys_order() -> None:
    assert list(outlines.every_method()) == list(EVERY_METHOD)
    assert list(outlined()) == list(REAL)


@pytest.mark.parametrize("name", REAL)
def test_an_outline_has_the_same_fields_types_defaults_and_metadata(name: str) -> None:
    real, outline = REAL[name], outlined()[name]
    assert (
        get_type_hints(outline).items()
        >= {f.name: get_type_hints(real)[f.name] for f in dataclasses.fields(real)}.items()
    )
    for found, wanted in zip(dataclasses.fields(outline), dataclasses.fields(real), strict=True):
        assert (found.name, found.default, dict(found.metadata)) == (wanted.name, wanted.default, dict(wanted.metadata))
    assert outlines.outline_of(outline)["fields"] == outlines.outline_of(real)["fields"]


def spelled(methods: Any) -> list[tuple[str, Any]]:
    """Every flag with its name, type, help and spelling."""
    flags = [(flag.name, get_args(flag.annotation)) for flag in method_flags(methods)]
    return [(name, (hint, vars(option))) for name, (hint, option) in flags]


def test_flags_of_outlines_are_flags_of_methods() -> None:
    assert spelled(outlines.every_method()) == spelled(EVERY_METHOD)
    assert spelled(outlines.train_methods()) == spelled(TRAIN_METHODS)


def test_a_bound_of_the_method_is_one_of_its_outline() -> None:
    for cls in (EVERY_METHOD["gptq"], outlines.every_method()["gptq"]):
        with pytest.raises(Exception, match="gptq: bits=77 cannot be; allowed: integers from 1 to 8, none"):
            require_possible(cls, {"bits": 77})
        require_possible(cls, {"bits": 4, "group_size": None})


def test_names_that_are_written_twice_agree() -> None:
    from fettle.cli.generate import CACHE_BITS as offered

    assert sorted(offered) == sorted(CACHE_BITS)
    assert (AUTO, *ENGINES) == ENGINE_NAMES


QUICK = {
    "compress --help": 0,
    "train --help": 0,
    "generate --help": 0,
    "evaluate --help": 0,
    "diagnose --help": 0,
    "bench --help": 0,
    "methods gptq": 0,
    "compress demo --bits 77": 2,
    "compress demo -o out --method gptq --bits 77": 2,
    "compress demo -o out --method gtpq": 2,
    "compress demo -o out --recipe x --method gptq": 2,
    "compress demo -o out --bits 4": 2,
    "compress demo -o out --candidate gptq": 2,
    "compress": 2,
    "plan nowhere --method gptq": 4,
    "train demo -o out": 2,
    "train demo -o out --method distill --steps -1": 2,
    "evaluate demo --max-kl 1": 2,
    "evaluate demo --report a.html --no-report": 2,
    "generate demo x --cache-bits 3": 2,
    "generate demo x --temperature -1": 2,
    "bench demo --batches 1,x": 2,
    "cache nowhere --bits x": 2,
}
SCRIPT = """
import contextlib, io, sys
from fettle.cli.main import main
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(line.split())
    print(code, [name for name in ("torch", "transformers") if name in sys.modules], line)
"""


def test_help_and_mistakes_are_answered_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *QUICK], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{code} [] {line}" for line, code in QUICK.items()]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "compress demo -o out --method resize --latency 0.5",
            "latency='0.5' is no share of the original's; write 0.5x",
        ),
        ("compress demo -o out --method resize --parameters half", "with an x behind it, such as 0.6x"),
        ("generate demo x --cache-bits 4 --engine native", "--cache-bits 4 goes with --engine torch"),
        ("generate nowhere x --cache-bits 3", "kept in 8, 4, 2 bits"),  # before the model is looked for
        ("generate nowhere x --cache-bits 4 --draft lookup", "without --draft"),
        ("generate demo --chat", "error: demo has no chat template"),  # named as asked, before any line is read
        ("generate demo x --engine nativ", "did you mean 'native'"),
        ("bench nowhere --cache-bits 4", "allowed: 8"),
    ],
)
def test_mistakes_are_told_in_the_users_words(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert words in capsys.readouterr().err
