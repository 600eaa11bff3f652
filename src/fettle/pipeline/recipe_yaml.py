"""What a recipe's YAML may be: plain types, each key once, and no key that nobody knows.

YAML's own rules let mistakes pass: of a key that stands twice the last one wins, `2:4` is a number to the base of
sixty, and an escape can spell half a character, which no file can hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from fettle.errors import RecipeError, unknown_word


def load_yaml(text: str) -> Any:
    """The plain values that a text spells.

    Raises:
        yaml.YAMLError: no YAML, or a key that stands twice.
        ValueError: half a character; a date that cannot be.
    """
    return yaml.load(text, _Loader)


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
