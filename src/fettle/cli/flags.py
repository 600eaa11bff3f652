"""Flags from dataclasses: the same fields are recipe keys, command-line flags and help text.

A method is a frozen dataclass whose fields carry `metadata={"help": …}`. `method_flags` merges the fields of all
methods into one list, one flag a name; `method_fields` later tells which of them the user gave. Values arrive as text
and are converted by the field's own type; whether a value is possible is the method's business
(`registry.from_fields`), so the command line and a recipe file give the same message.

Typer reads a function's signature. A verb that takes dataclass flags declares `**fields` and `@with_flags` puts the
generated parameters in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from fettle.errors import UsageError, unknown_word

Verb = TypeVar("Verb", bound=Callable[..., None])


def parse(run: Callable[..., None], arguments: list[str], prog_name: str) -> Callable[[], None] | None:
    """Parses a verb's arguments; returns the call to make, or None when the help was printed.

    Raises:
        UsageError: an argument that the verb does not have, or a value of another type.
    """
    app = typer.Typer(
        add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
    )

    def deferred(**values: Any) -> Callable[[], None]:
        return functools.partial(run, **values)

    deferred.__signature__ = inspect.signature(run, eval_str=True)  # type: ignore[attr-defined]
    deferred.__annotations__ = {}
    app.command(help=inspect.getdoc(run))(deferred)
    try:
        result = app(args=arguments, prog_name=prog_name, standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")
        raise UsageError(f"{message[:1].lower()}{message[1:]}. See: {prog_name} --help") from None
    return result if callable(result) else None


def with_flags(*groups: Iterable[inspect.Parameter]) -> Callable[[Verb], Verb]:
    """Puts generated flags where the decorated verb says `**fields`."""

    def decorate(run: Verb) -> Verb:
        signature = inspect.signature(run, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        generated = [parameter for group in groups for parameter in group]
        run.__signature__ = signature.replace(parameters=[*own, *generated])  # type: ignore[attr-defined]
        return run

    return decorate


def dataclass_flags(cls: type, *, rename: Mapping[str, str] | None = None, panel: str = "") -> list[inspect.Parameter]:
    """One optional flag for each field of a dataclass; `rename` maps a field to another flag's name."""
    hints = get_type_hints(cls)
    defaults = {f.name: default_words(f) for f in dataclasses.fields(cls)}
    return [
        _flag(f.name, hints[f.name], _help(f, panel, defaults[f.name]), (rename or {}).get(f.name, f.name))
        for f in dataclasses.fields(cls)
    ]


def switched_flags(switch: str, text: str, cls: type) -> list[inspect.Parameter]:
    """A flag that turns something on, and one for each field of its dataclass: `--rotate`, `--rotate-seed`."""
    hints = get_type_hints(cls)
    annotation: Any = Annotated[bool, typer.Option(f"--{switch}", help=text, show_default=False)]
    first = inspect.Parameter(switch, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    fields = dataclasses.fields(cls)
    names = [f"{switch}_{field.name}" for field in fields]
    helps = [_help(field, f"--{switch}", default_words(field)) for field in fields]
    flags = zip(fields, names, helps, strict=True)
    return [first, *(_flag(name, hints[field.name], text, name) for field, name, text in flags)]


def method_flags(methods: Mapping[str, type]) -> list[inspect.Parameter]:
    """The fields of all methods, merged: one flag a field name, saying which methods have it."""
    flags: dict[str, inspect.Parameter] = {}
    for name in _field_names(methods):
        owners = {m: f for m, cls in methods.items() for f in dataclasses.fields(cls) if f.name == name}
        first = next(iter(owners))
        hint = get_type_hints(methods[first])[name]
        defaults = {default_words(f) for f in owners.values()}
        whose = "" if len(owners) == len(methods) else ", ".join(owners)
        default = defaults.pop() if len(defaults) == 1 else "by method"
        flags[name] = _flag(name, hint, _help(owners[first], whose, default), name)
    return list(flags.values())


def given(cls_or_names: Iterable[str], fields: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the user gave, converted to their fields' types."""
    return {name: convert(name, fields[name], hints[name]) for name in cls_or_names if fields.get(name) is not None}


def method_fields(methods: Mapping[str, type], method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own fields among the given flags.

    Raises:
        UsageError: a flag that this method lacks, with the nearest that it has.
    """
    cls = methods[method]
    own = [f.name for f in dataclasses.fields(cls)]
    for name in _field_names(methods):
        if fields.get(name) is not None and name not in own:
            raise UsageError(unknown_word(f"flag of the method {method}", flag_name(name), map(flag_name, own)))
    return given(own, fields, get_type_hints(cls))


def convert(name: str, text: Any, hint: Any) -> Any:
    """The value that a flag's text means for a field of type `hint`."""
    if isinstance(text, bool):
        return text
    members = _members(hint)
    for value in (v for member in members if get_origin(member) is Literal for v in get_args(member)):
        if text == str(value):
            return value
    if types.NoneType in members and text.lower() == "none":
        return None
    for kind in (int, float):
        if kind in members:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in members or any(get_origin(member) is Literal for member in members):
        return text  # a word that is no choice: the method refuses it, with the choices
    raise UsageError(f"--{flag_name(name)} {text!r} is no {metavar(hint).lower()}")


def flag_name(field: str) -> str:
    """How a field is spelled on the command line, without the dashes."""
    return field.replace("_", "-")


def _field_names(methods: Mapping[str, type]) -> list[str]:
    return list(dict.fromkeys(f.name for cls in methods.values() for f in dataclasses.fields(cls)))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def metavar(hint: Any) -> str:
    """What stands for a value of this type in the help: INTEGER, NUMBER, a|b, INTEGER|none."""
    words = []
    for member in _members(hint):
        if get_origin(member) is Literal:
            words += [str(value) for value in get_args(member)]
        elif member is types.NoneType:
            words.append("none")
        else:
            words.append({int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(member, str(member)))
    return "|".join(words)


def default_words(field: dataclasses.Field[Any]) -> str:
    """A field's default for people; empty where there is none."""
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else str(field.default_factory())
    if field.default is None:
        return "none"
    return (
        {True: "yes", False: "no"}.get(field.default, str(field.default))
        if isinstance(field.default, bool)
        else str(field.default)
    )


def _help(field: dataclasses.Field[Any], whose: str, default: str) -> str:
    text = str(field.metadata.get("help", field.name)).rstrip(".")
    notes = [note for note in (whose, f"default {default}" if default else "") if note]
    return f"{text} [{'; '.join(notes)}]" if notes else text


def _flag(name: str, hint: Any, text: str, flag: str) -> inspect.Parameter:
    spelled = flag_name(flag)
    if hint is bool:
        option = typer.Option(f"--{spelled}/--no-{spelled}", help=text, show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        option = typer.Option(f"--{spelled}", help=text, metavar=metavar(hint), show_default=False)
        annotation = Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
