"""What the YAML of a recipe or a chain may be: plain types, each key once, and no key that nobody knows.

YAML's own rules let mistakes pass: of a key that stands twice the last one wins, `2:4` is a number to the base of
sixty, and an escape can spell half a character, which no file can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fettle.errors import RecipeError, unknown_word

Parsed = TypeVar("Parsed")


def parse_file(path: Path, parse: Callable[[Any, str], Parsed]) -> Parsed:
    """What `parse` makes of a YAML file's plain values; it gets them and the path, for its errors.

    Raises:
        RecipeError: no YAML, a key that stands twice, or what `parse` refuses.
    """
    try:
        return parse(yaml.load(path.read_text(encoding="utf-8"), _Loader), str(path))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # ValueError: what is no UTF-8, and dates and numbers that Python cannot hold or print
        raise RecipeError(f"{path} is no YAML that a recipe can be: {error}") from error


def named_file(kind: str, path_or_name: str | Path, shipped: Iterable[Path]) -> Path:
    """The file that a user's word means: a path, or the name of a shipped one, with or without .yaml.

    Raises:
        RecipeError: there is none; offers the nearest name. `kind` is what it would be, for the sentence.
    """
    path, names = Path(path_or_name), {file.stem: file for file in shipped}
    if path.is_file():
        return path
    name = str(path_or_name).removesuffix(".yaml")
    if name not in names or not names[name].is_file():
        raise RecipeError(f"{unknown_word(kind, str(path_or_name), names)}, or the path of a YAML file that exists")
    return names[name]


def refuse_unknown(mapping: Mapping[str, Any], allowed: Iterable[str], origin: str, kind: str) -> None:
    """Raises RecipeError for a key that is not allowed, with the nearest one that is."""
    names = list(allowed)
    for key in mapping:
        if key not in names:
            raise RecipeError(f"{origin}: {unknown_word(kind, str(key), names)}")


class _Loader(yaml.SafeLoader):
    """YAML's plain types, without what would pass unnoticed: a key that stands twice, half a character."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = str(super().construct_scalar(node))
        text.encode("utf-8")  # refuses half of a character, which an escape can spell
        return text

    def construct_number(self, node: yaml.ScalarNode) -> int | str:
        """A whole number; 2:4 is a pattern here, and no 124 to the base of sixty."""
        return str(node.value) if ":" in node.value else int(self.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
