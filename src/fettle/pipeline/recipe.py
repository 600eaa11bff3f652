"""Recipe: what to do to which linears, on which text; read from YAML, a mapping, or one line of flags.

    name: gptq-4bit
    calibration: {windows: 128, length: 256, seed: 0}
    storage: pack-quantized
    steps:
      - method: gptq
        bits: 4
        where: {role: [gate, up, down], blocks: "0-3,-1", name: "*.mlp.*"}

A step without `where` means every linear of the blocks except routers: a quantized router sends tokens to the wrong
experts and saves nothing. Embeddings and the head are touched only by a step that names them. Where several steps match
one linear, the last one wins.

A step of a method for the whole model (`- method: rotation`) stands first, once and without `where`: all steps behind
it see the model as it leaves it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from fettle.errors import RecipeError, unknown_word
from fettle.methods import registry
from fettle.methods.protocols import BasisMethod, MatrixMethod
from fettle.models.anatomy import Anatomy, Linear
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.scheme import Scheme

Storage = Literal["pack-quantized", "int-quantized", "dense"]  # dense: pruned weights alone, zeros written out
Allocation = Literal["uniform", "global", "sensitivity", "outliers"]
Parsed = TypeVar("Parsed")
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


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The text that methods look at, cut into windows."""

    windows: int = field(default=128, metadata={"help": "how many windows of text", "minimum": 1})
    length: int = field(default=256, metadata={"help": "tokens a window", "minimum": 2})
    seed: int = field(default=0, metadata={"help": "which windows are drawn", "minimum": 0, "maximum": 2**63 - 1})
    text: str | None = field(default=None, metadata={"help": "UTF-8 text file; without it the embedded text"})
    order: Literal["together", "in_turn"] = field(
        default="in_turn",
        metadata={
            "help": "inside a block: all linears from one pass, or each group of linears after the one that feeds it"
        },
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """One method and the linears that it is for."""

    method: MatrixMethod
    where: Where = field(default_factory=Where)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ordered list of steps, the calibration and the storage format.

    `allocation` says how the share that a single pruning step prunes is spread over its linears; `search/allocation.py`
    turns any but "uniform" into a recipe with a step for each linear before a run is prepared.
    """

    name: str
    steps: tuple[Step, ...]
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    storage: Storage = "pack-quantized"
    allocation: Allocation = "uniform"
    basis: BasisMethod | None = None  # what the whole model passes through before the steps

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_recipe` reads back to an equal recipe."""
        steps: list[dict[str, Any]] = []
        if self.basis is not None:
            steps.append({"method": self.basis.name, **registry.to_fields(self.basis)})
        for step in self.steps:
            where = {k: v for k, v in dataclasses.asdict(step.where).items() if v is not None}
            if "role" in where:
                where["role"] = list(where["role"])
            entry: dict[str, Any] = {"method": step.method.name, **registry.to_fields(step.method)}
            steps.append({**entry, "where": where} if where else entry)
        calibration = {k: v for k, v in dataclasses.asdict(self.calibration).items() if v is not None}
        spread = {} if self.allocation == "uniform" else {"allocation": self.allocation}
        return {"name": self.name, "calibration": calibration, "storage": self.storage, **spread, "steps": steps}

    def to_yaml(self) -> str:
        """The recipe as YAML, every default spelled out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Reads a recipe from a file, or a shipped one by its name (`gptq-4bit`).

    Raises:
        RecipeError: no such file or name, no YAML, or something impossible inside.
    """
    path = Path(path_or_name)
    shipped = {p.stem: p for p in shipped_recipes()}
    if not path.is_file() and str(path_or_name).removesuffix(".yaml") in shipped:
        path = shipped[str(path_or_name).removesuffix(".yaml")]
    if not path.is_file():
        raise RecipeError(
            f"{unknown_word('recipe', str(path_or_name), shipped)}, or the path of a YAML file that exists"
        )
    return parse_file(path, parse_recipe)


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


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package."""
    return sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def parse_recipe(mapping: Any, origin: str) -> Recipe:
    """Builds a recipe from a mapping; `origin` names it in errors.

    Raises:
        RecipeError: an unknown key (with the nearest spelling), or a value that cannot be.
    """
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"{origin}: a recipe is a mapping with the key 'steps', got {type(mapping).__name__}")
    if "stages" in mapping:
        raise RecipeError(f"{origin}: this is a chain of stages, which train; run it with: fettle train --recipe")
    _refuse_unknown(mapping, ("name", "calibration", "storage", "allocation", "steps"), origin, "recipe key")
    steps = mapping.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError(f"{origin}: 'steps' must be a list with at least one step, got {steps!r}")
    storage = mapping.get("storage", "pack-quantized")
    if storage not in get_args(Storage):
        raise RecipeError(f"{origin}: {unknown_word('storage', str(storage), get_args(Storage))}")
    basis = _parse_basis(steps, origin)
    allocation = mapping.get("allocation", "uniform")
    if allocation not in get_args(Allocation):
        raise RecipeError(f"{origin}: {unknown_word('allocation', str(allocation), get_args(Allocation))}")
    recipe = Recipe(
        name=str(mapping.get("name", Path(origin).stem)),
        basis=basis,
        steps=tuple(
            _parse_step(step, f"{origin}, step {i + 1}") for i, step in enumerate(steps) if i > 0 or basis is None
        ),
        calibration=_parse_calibration(mapping.get("calibration") or {}, origin),
        storage=storage,
        allocation=allocation,
    )
    check_recipe(recipe, origin)
    return recipe


def check_recipe(recipe: Recipe, origin: str) -> None:
    """Checks that storage, allocation and steps fit together.

    Raises:
        RecipeError: they do not.
    """
    schemes = [(step.method.name, step.method.scheme("float32")) for step in recipe.steps]
    for name, scheme in schemes:
        if recipe.storage == "dense" and not isinstance(scheme, MaskedScheme):
            raise RecipeError(
                f"{origin}: storage dense writes pruned weights out with their zeros, and {name} gives codes; use "
                "storage: pack-quantized, or a method that prunes"
            )
        if recipe.storage == "int-quantized":
            try:
                scheme.check_storage(recipe.storage)
            except RecipeError as error:
                raise RecipeError(f"{origin}: {error}") from None
    if recipe.allocation == "uniform":
        return
    if len(schemes) != 1 or not isinstance(schemes[0][1], MaskedScheme) or schemes[0][1].shape_of_mask.fixed_sparsity:
        raise RecipeError(
            f"{origin}: allocation {recipe.allocation} spreads the sparsity of one pruning step over its linears; give "
            "one step, with the pattern layer, row or a block, or use allocation: uniform"
        )


def recipe_from_method(name: str, fields: Mapping[str, Any], calibration: CalibrationOptions | None = None) -> Recipe:
    """The one-line form: one method for every linear of the blocks."""
    method = registry.from_fields(name, fields)
    title = _title(method)
    checked = _parse_calibration(dataclasses.asdict(calibration or CalibrationOptions()), "calibration")
    return Recipe(name=title, steps=(Step(method=method),), calibration=checked, storage=_usual_storage(method))


def with_basis(recipe: Recipe, basis: BasisMethod) -> Recipe:
    """The recipe with `basis` before its steps; RecipeError where it has one already."""
    if recipe.basis is not None:
        raise RecipeError(f"the recipe {recipe.name} has a step {recipe.basis.name} already; leave out --rotate")
    return dataclasses.replace(recipe, basis=basis, name=f"{basis.name}-{recipe.name}")


def _title(method: MatrixMethod) -> str:
    """A name for a recipe of one method: gptq-4bit, wanda-50%, sparsegpt-2:4-4bit."""
    scheme = method.scheme("float32")
    if not isinstance(scheme, MaskedScheme):
        return f"{method.name}-{scheme.bits}bit"
    pruned = scheme.pattern if scheme.shape_of_mask.fixed_sparsity else f"{100 * scheme.sparsity:g}%"
    return f"{method.name}-{pruned}" + (f"-{scheme.values.grid.bits}bit" if scheme.values is not None else "")


def _usual_storage(method: MatrixMethod) -> Storage:
    """Integers to multiply with integers lie unpacked, as loaders of quantized inputs expect them."""
    scheme = method.scheme("float32")
    if not isinstance(scheme, Scheme):
        return "pack-quantized"
    whole = scheme.activations is not None and scheme.grid.is_uniform and scheme.bits == 8
    return "int-quantized" if whole else "pack-quantized"


def assign(recipe: Recipe, anatomy: Anatomy) -> dict[str, MatrixMethod]:
    """Which method each linear gets, by the linear's name; linears without one are kept as they are.

    Raises:
        RecipeError: a role that this model does not have, or a step that matches nothing.
    """
    linears = [*anatomy.linears(), *(x for x in (anatomy.embedding, anatomy.head) if x is not None)]
    roles = {linear.role for linear in linears}
    assigned: dict[str, MatrixMethod] = {}
    for number, step in enumerate(recipe.steps, start=1):
        for role in step.where.role or ():
            if role not in roles:
                raise RecipeError(f"recipe {recipe.name}, step {number}: {unknown_word('role', role, roles)}")
        matched = [linear for linear in linears if step.where.matches(linear, len(anatomy.blocks))]
        if not matched:
            raise RecipeError(
                f"recipe {recipe.name}, step {number}: 'where' {dataclasses.asdict(step.where)} matches no linear of this "  # noqa: E501
                f"model; it has {len(anatomy.blocks)} blocks and the roles {', '.join(sorted(roles))}"
            )
        for linear in matched:
            assigned[linear.name] = step.method
    return assigned


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


def _parse_basis(steps: list[Any], origin: str) -> BasisMethod | None:
    """The method of the first step where it is one for the whole model; RecipeError where one stands elsewhere."""
    names = [step.get("method") if isinstance(step, Mapping) else None for step in steps]
    for number, name in enumerate(names[1:], start=2):
        if name in registry.BASES:
            raise RecipeError(
                f"{origin}, step {number}: {name} is for the whole model, before anything is compressed; make it the "
                "first step, and the only one of its kind"
            )
    if names[0] not in registry.BASES:
        return None
    if "where" in steps[0]:
        raise RecipeError(
            f"{origin}, step 1: {names[0]} is for the whole model, all linears at once: leave out 'where' there; the "
            "steps behind it may have one"
        )
    if len(steps) == 1:
        raise RecipeError(
            f"{origin}: {names[0]} alone makes nothing smaller; add a step that compresses, such as: - method: gptq"
        )
    try:
        return registry.basis_from_fields(names[0], {key: value for key, value in steps[0].items() if key != "method"})
    except RecipeError as error:
        raise RecipeError(f"{origin}, step 1: {error}") from None


def _parse_step(mapping: Any, origin: str) -> Step:
    if not isinstance(mapping, Mapping) or "method" not in mapping:
        raise RecipeError(f"{origin}: a step is a mapping with the key 'method', got {mapping!r}")
    fields = {key: value for key, value in mapping.items() if key not in ("method", "where")}
    try:
        method = registry.from_fields(str(mapping["method"]), fields)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from None
    return Step(method=method, where=_parse_where(mapping.get("where") or {}, origin))


def _parse_where(mapping: Any, origin: str) -> Where:
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"{origin}: 'where' is a mapping with role, blocks or name, got {mapping!r}")
    _refuse_unknown(mapping, [f.name for f in dataclasses.fields(Where)], origin, "key of 'where'")
    role = mapping.get("role")
    if role is not None and not isinstance(role, str | list | tuple):
        raise RecipeError(f"{origin}: 'role' is a name or a list of names, got {role!r}; write role: [gate, up]")
    roles = None if role is None else (role,) if isinstance(role, str) else tuple(str(r) for r in role)
    blocks, name = mapping.get("blocks"), mapping.get("name")
    if blocks is not None:
        parse_blocks(str(blocks), None)
    return Where(role=roles, blocks=None if blocks is None else str(blocks), name=None if name is None else str(name))


def _parse_calibration(mapping: Any, origin: str) -> CalibrationOptions:
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"{origin}: 'calibration' is a mapping with windows, length, seed or text, got {mapping!r}")
    allowed = {f.name: f for f in dataclasses.fields(CalibrationOptions)}
    _refuse_unknown(mapping, allowed, origin, "key of 'calibration'")
    for name, value in mapping.items():
        minimum = allowed[name].metadata.get("minimum")
        if minimum is not None and (not isinstance(value, int) or isinstance(value, bool) or value < minimum):
            raise RecipeError(f"{origin}: calibration {name}={value!r}; it must be an integer of at least {minimum}")
        maximum = allowed[name].metadata.get("maximum")
        if maximum is not None and value > maximum:
            raise RecipeError(f"{origin}: calibration {name}={value!r}; it must be an integer of at most {maximum}")
    if mapping.get("order", "together") not in ("together", "in_turn"):
        raise RecipeError(
            f"{origin}: {unknown_word('calibration order', str(mapping['order']), ('together', 'in_turn'))}"
        )
    text = mapping.get("text")
    return CalibrationOptions(**{**mapping, "text": None if text is None else str(text)})


def _refuse_unknown(mapping: Mapping[str, Any], allowed: Iterable[str], origin: str, kind: str) -> None:
    names = list(allowed)
    for key in mapping:
        if key not in names:
            raise RecipeError(f"{origin}: {unknown_word(kind, str(key), names)}")
