"""Where: which linears a step of a recipe is for, by role, block and name.

where: {role: [gate, up, down], blocks: "0-3,-1", name: "*.mlp.*"}
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fettle.errors import RecipeError
from fettle.models.anatomy import Linear
from fettle.pipeline.recipe_yaml import refuse_unknown

NAMED_ONLY = frozenset({"embedding", "head", "router"})  # roles that a step must name to touch them


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which linears a step touches; every given condition must hold."""

    role: tuple[str, ...] | None = field(default=None, metadata={"help": "roles, such as query or down"})
    blocks: str | None = field(default=None, metadata={"help": "blocks, such as 0-3,-1"})
    name: str | None = field(default=None, metadata={"help": "glob over names, such as *.mlp.*"})

    def matches(self, linear: Linear, block_count: int) -> bool:
        """Whether the step touches this linear of a model with `block_count` blocks."""
        if self.role is None and linear.role in NAMED_ONLY and not (self.name and linear.name == self.name):
            return False
        if self.role is not None and linear.role not in self.role:
            return False
        if self.blocks is not None and (
            linear.block is None or linear.block not in parse_blocks(self.blocks, block_count)
        ):
            return False
        return self.name is None or fnmatch.fnmatchcase(linear.name, self.name)


def parse_blocks(text: str, block_count: int | None) -> set[int]:
    """The block indices that "0-3,-1" means in a model with `block_count` blocks; None checks the form alone."""
    chosen: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(?:(-?\d{1,6})|(\d{1,6})-(-?\d{1,6}))\s*", part)
        if match is None:
            raise RecipeError(
                f"blocks {text!r} is no list of blocks; write indices and ranges such as 0-3,7,-1 (-1 is the last)"
            )
        low, high = (int(match[1]), int(match[1])) if match[1] else (int(match[2]), int(match[3]))
        if block_count is None:
            continue
        low, high = (index + block_count if index < 0 else index for index in (low, high))
        if not 0 <= low <= high < block_count:
            raise RecipeError(f"blocks {text!r}: {part.strip()} is outside 0 to {block_count - 1}")
        chosen.update(range(low, high + 1))
    return chosen


def parse_where(mapping: Any, origin: str) -> Where:
    """The `where` of a step; `origin` names it in errors.

    Raises:
        RecipeError: an unknown key, or a value that cannot be.
    """
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"{origin}: 'where' is a mapping with role, blocks or name, got {mapping!r}")
    refuse_unknown(mapping, [f.name for f in dataclasses.fields(Where)], origin, "key of 'where'")
    role = mapping.get("role")
    if role is not None and not isinstance(role, str | list | tuple):
        raise RecipeError(f"{origin}: 'role' is a name or a list of names, got {role!r}; write role: [gate, up]")
    roles = None if role is None else (role,) if isinstance(role, str) else tuple(str(r) for r in role)
    blocks, name = mapping.get("blocks"), mapping.get("name")
    if blocks is not None:
        parse_blocks(str(blocks), None)
    return Where(role=roles, blocks=None if blocks is None else str(blocks), name=None if name is None else str(name))
