"""Which matrices get an adapter, and of which rank: by role, in groups, head and embedding where they are named.

A new domain has other words before it has other grammar, so that much of what full fine-tuning wins lies outside of the
blocks: in the head, whose rows say how frequent a token is, and in the embedding. `all` stands for the blocks' linears
alone, as in most of the literature; `head` and `embedding` are asked for by name. A head that is tied to the embedding
gets an adapter of its own: their shared rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fettle.errors import RecipeError, UsageError
from fettle.models.loading import LoadedModel
from fettle.models.parts import Linear

GROUPS = {
    "attention": ("query", "key", "value", "query_key_value", "output"),
    "mlp": ("gate", "up", "down", "gate_up"),
}
OUTSIDE = ("head", "embedding")
IN_BLOCKS = tuple(role for group in GROUPS.values() for role in group)
WORDS = ("all", *GROUPS, *IN_BLOCKS, *OUTSIDE)


def parsed_roles(targets: str) -> tuple[str, ...]:
    """The roles that `targets` names, each once.

    Raises:
        RecipeError: a word that is neither a role nor one of the groups.
    """
    return tuple(dict.fromkeys(role for word in targets.split(",") for role in _of_word(word.strip(), "targets")))


def parsed_ranks(ranks: str | None) -> dict[str, int]:
    """Role → rank, of "mlp=2,head=4"; a later word overrules an earlier one.

    Raises:
        RecipeError: a word that names no role, or no rank of at least 1.
    """
    found: dict[str, int] = {}
    for word in (ranks or "").split(",") if ranks else ():
        role, _, rank = (part.strip() for part in word.partition("="))
        if not rank.isdecimal() or int(rank) < 1:
            raise RecipeError(
                f"ranks={ranks!r} names {word.strip()!r}; allowed: role=rank with commas, as mlp=2,head=4"
            )
        found.update(dict.fromkeys(_of_word(role, "ranks"), int(rank)))
    return found


def check_ranks(ranks: str | None, roles: Collection[str]) -> None:
    """Checks that every word of `ranks` names one of these roles at least.

    Raises:
        RecipeError: one names none.
    """
    for word in (ranks or "").split(",") if ranks else ():
        named = parsed_ranks(word)
        if not set(named) & set(roles):
            raise RecipeError(
                f"ranks={ranks!r} names {word.partition('=')[0].strip()}, which targets leaves out; allowed here: "
                f"{', '.join(roles)}"
            )


def target_linears(loaded: LoadedModel, roles: Iterable[str]) -> list[Linear]:
    """The model's matrices that have one of these roles; every linear of the blocks for a family without a table.

    Raises:
        RecipeError: there is none, or no head or embedding where one is named.
    """
    roles, anatomy = tuple(roles), loaded.anatomy
    found = [x for x in anatomy.linears() if x.slot.index is None and x.role in roles]
    if anatomy.family == "generic":
        found = list(anatomy.linears())
    for role, linear in (("head", anatomy.head), ("embedding", anatomy.embedding)):
        if role in roles:
            if linear is None:
                raise RecipeError(f"a {anatomy.family} model's {role} is not known; leave {role} out")
            found.append(linear)
    if not found:
        known = ", ".join(sorted({linear.role for linear in anatomy.linears()}))
        raise RecipeError(f"no linear of this model has one of the roles {', '.join(roles)}; it has {known}")
    return found


def module_path(linear: Linear) -> str:
    """Where its module stands in transformers' tree."""
    return linear.slot.parameter.removesuffix(".weight")


def require_mergeable(loaded: LoadedModel, paths: Collection[str]) -> None:
    """Checks that what the modules at `paths` learned has a place in a dense model.

    Raises:
        UsageError: one of them is the head or the embedding, and both are one matrix.
    """
    anatomy = loaded.anatomy
    shared = [x for x in (anatomy.head, anatomy.embedding) if x is not None and _named(module_path(x), paths)]
    if anatomy.tied and shared:
        raise UsageError(
            f"head and embedding of {loaded.folder} share one matrix, so an adapter of the {shared[0].role} cannot be "
            "merged; leave merge and use it beside the base, or targets without head and embedding"
        )


def _named(path: str, targets: Collection[str]) -> bool:
    """Whether PEFT's targets, which may be the ends of paths, name this module."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _of_word(word: str, key: str) -> tuple[str, ...]:
    if word not in WORDS:
        raise RecipeError(f"{key} names {word!r}; allowed: {', '.join(WORDS)}, with commas")
    return IN_BLOCKS if word == "all" else GROUPS.get(word, (word,))
