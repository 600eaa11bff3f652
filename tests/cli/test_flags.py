"""Flags from dataclasses: names, types, merged methods and the errors of wrong ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fettle.cli.flags import convert, dataclass_flags, method_fields, method_flags, parse, with_flags
from fettle.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Prune:
    sparsity: float = field(default=0.5, metadata={"help": "share of weights to drop"})
    bits: int = field(default=4, metadata={"help": "bits of a code"})
    asymmetric: bool = field(default=False, metadata={"help": "store zero points"})


@dataclass(frozen=True, kw_only=True)
class Round:
    bits: int = field(default=8, metadata={"help": "bits of a code"})
    group_size: int | None = field(default=None, metadata={"help": "weights that share a scale"})
    reach: Literal["minmax", "search"] = field(default="minmax", metadata={"help": "how the range is chosen"})


METHODS: dict[str, type] = {"prune": Prune, "round": Round}
NOTHING: dict[str, Any] = dict.fromkeys(("sparsity", "bits", "asymmetric", "group_size", "reach"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    caught: dict[str, Any] = {}

    @with_flags(method_flags(METHODS))
    def run(model: str, **fields: Any) -> None:
        """Do it."""
        caught.update(fields, model=model)

    work = parse(run, arguments, "fettle run")
    assert work is not None
    work()
    return caught


def test_every_field_of_every_method_is_one_flag() -> None:
    assert [p.name for p in method_flags(METHODS)] == ["sparsity", "bits", "asymmetric", "group_size", "reach"]


def test_what_was_not_given_is_none() -> None:
    assert parsed(["m"]) == {"model": "m", **NOTHING}


def test_flags_become_values_of_their_fields_types() -> None:
    fields = parsed(["m", "--bits", "3", "--group-size", "none", "--reach", "search"])
    assert method_fields(METHODS, "round", fields) == {"bits": 3, "group_size": None, "reach": "search"}
    fields = parsed(["m", "--sparsity", "0.25", "--asymmetric"])
    assert method_fields(METHODS, "prune", fields) == {"sparsity": 0.25, "asymmetric": True}


def test_a_flag_that_the_method_lacks_gets_the_nearest_one_that_it_has() -> None:
    with pytest.raises(
        UsageError, match=r"unknown flag of the method round 'sparsity'.*Allowed: bits, group-size, reach"
    ):
        method_fields(METHODS, "round", {**NOTHING, "sparsity": "0.5"})


def test_an_unknown_flag_gets_its_nearest_spelling() -> None:
    with pytest.raises(UsageError, match=r"--group-siz.*--group-size.*See: fettle run --help"):
        parsed(["m", "--group-siz", "32"])


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("4", int, 4),
        ("0.5", float, 0.5),
        ("4", float, 4.0),
        ("none", int | None, None),
        ("NONE", str | None, None),
        ("32", int | None, 32),
        ("a b", str, "a b"),
        (True, bool, True),
        ("minmax", Literal["minmax", "search"], "minmax"),
        ("auto", float | Literal["auto"], "auto"),
        ("0.1", float | Literal["auto"], 0.1),
        ("none", Literal["none", "search"], "none"),
        ("none", Literal["search"] | None, None),
        ("2", Literal[2, 4], 2),
    ],
)
def test_conversion(text: Any, hint: Any, value: Any) -> None:
    found = convert("field", text, hint)
    assert found == value
    assert type(found) is type(value)


def test_conversion_names_the_flag_and_the_value() -> None:
    with pytest.raises(UsageError, match="--group-size 'many' is no integer"):
        convert("group_size", "many", int | None)


def test_the_help_shows_default_owner_and_type(capsys: pytest.CaptureFixture[str]) -> None:
    @with_flags(dataclass_flags(Round, panel="round"))
    def run(**fields: Any) -> None:
        """Do it."""

    assert parse(run, ["--help"], "fettle run") is None
    words = " ".join(capsys.readouterr().out.split())
    assert "--bits INTEGER bits of a code [round; default 8]" in words
    assert "--group-size INTEGER|none weights that share a scale [round; default none]" in words
    assert "--reach minmax|search" in words


def test_a_default_that_differs_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    @with_flags(method_flags(METHODS))
    def run(**fields: Any) -> None:
        """Do it."""

    parse(run, ["--help"], "fettle run")
    words = " ".join(capsys.readouterr().out.split())
    assert "bits of a code [default by method]" in words
    assert "--asymmetric / --no-asymmetric store zero points [prune; default no]" in words
