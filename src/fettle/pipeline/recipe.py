"""Recipe: what to do to which linears, on which text; read from YAML, a mapping, or one line of flags.

    name: gptq-4bit
    calibration: {windows: 128, length: 256, seed: 0}
    storage: pack-quantized
    steps:
      - method: gptq
        bits: 4
        where: {role: [gate, up, down], blocks: "0-3,-1", name: "*.mlp.*"}

A step that gives the model another shape (`drop_layers`, `narrow`, …) is about the whole model: it has no `where`, and
stands before the steps that compress linears, which then see the new shape.

A step without `where` means every linear of the blocks except routers: a quantized router sends tokens to the wrong
experts and saves nothing. Embeddings and the head are touched only by a step that names them. Where several steps match
one linear, the last one wins.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from fettle.errors import RecipeError, unknown_word
from fettle.methods import registry
from fettle.methods.protocols import LabelledMethod, MatrixMethod
from fettle.methods.registry import Method
from fettle.methods.reshape.subject import ModelMethod
from fettle.models.anatomy import Anatomy, Linear

Storage = Literal["pack-quantized", "int-quantized"]
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
    """One method and the linears that it is for; a method that reshapes the model is for all of it."""

    method: Method
    where: Where = field(default_factory=Where)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ordered list of steps, the calibration and the storage format."""

    name: str
    steps: tuple[Step, ...]
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    storage: Storage = "pack-quantized"

    @property
    def reshaping(self) -> tuple[ModelMethod, ...]:
        """The methods that give the model another shape, in order; they come first."""
        return tuple(step.method for step in self.steps if registry.reshapes(step.method))

    @property
    def compressing(self) -> tuple[tuple[int, MatrixMethod, Where], ...]:
        """The steps that compress linears: number in the recipe, from 1, method and where."""
        return tuple(
            (number, cast(MatrixMethod, step.method), step.where)
            for number, step in enumerate(self.steps, start=1)
            if not registry.reshapes(step.method)
        )

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_recipe` reads back to an equal recipe."""
        steps = []
        for step in self.steps:
            where = {k: v for k, v in dataclasses.asdict(step.where).items() if v is not None}
            if "role" in where:
                where["role"] = list(where["role"])
            entry: dict[str, Any] = {"method": step.method.name, **registry.to_fields(step.method)}
            steps.append({**entry, "where": where} if where else entry)
        calibration = {k: v for k, v in dataclasses.asdict(self.calibration).items() if v is not None}
        return {"name": self.name, "calibration": calibration, "storage": self.storage, "steps": steps}

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
    try:
        return parse_recipe(yaml.load(path.read_text(encoding="utf-8"), _Loader), str(path))
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
    _refuse_unknown(mapping, ("name", "calibration", "storage", "steps"), origin, "recipe key")
    steps = mapping.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError(f"{origin}: 'steps' must be a list with at least one step, got {steps!r}")
    storage = mapping.get("storage", "pack-quantized")
    if storage not in get_args(Storage):
        raise RecipeError(f"{origin}: {unknown_word('storage', str(storage), get_args(Storage))}")
    recipe = Recipe(
        name=str(mapping.get("name", Path(origin).stem)),
        steps=tuple(_parse_step(step, f"{origin}, step {i + 1}") for i, step in enumerate(steps)),
        calibration=_parse_calibration(mapping.get("calibration") or {}, origin),
        storage=storage,
    )
    _check_order(recipe, origin)
    if storage == "int-quantized":
        for _, method, _ in recipe.compressing:
            try:
                method.scheme("float32").check_storage(storage)
            except RecipeError as error:
                raise RecipeError(f"{origin}: {error}") from None
    return recipe


def _check_order(recipe: Recipe, origin: str) -> None:
    """Raises RecipeError for a reshaping step behind one that compresses, or with a `where`."""
    for before, step in zip((None, *recipe.steps), recipe.steps, strict=False):
        if not registry.reshapes(step.method):
            continue
        name = step.method.name
        if step.where != Where():
            raise RecipeError(f"{origin}: {name} gives the whole model another shape; leave 'where' out")
        if before is not None and not registry.reshapes(before.method):
            raise RecipeError(
                f"{origin}: {name} gives the model another shape, so it comes before {before.method.name}, which "
                "compresses linears as they then are; change the order of the steps"
            )


def recipe_from_method(name: str, fields: Mapping[str, Any], calibration: CalibrationOptions | None = None) -> Recipe:
    """The one-line form: one method for every linear of the blocks."""
    method = registry.from_fields(name, fields)
    checked = _parse_calibration(dataclasses.asdict(calibration or CalibrationOptions()), "calibration")
    if registry.reshapes(method):
        return Recipe(name=method.label(), steps=(Step(method=method),), calibration=checked)
    method = cast(MatrixMethod, method)
    bits = method.scheme("float32").grid.bits
    title = method.label() if isinstance(method, LabelledMethod) else f"{method.name}-{bits}bit"
    return Recipe(name=title, steps=(Step(method=method),), calibration=checked, storage=_usual_storage(method))


def _usual_storage(method: MatrixMethod) -> Storage:
    """Integers to multiply with integers lie unpacked, as loaders of quantized inputs expect them."""
    scheme = method.scheme("float32")
    whole = scheme.activations is not None and scheme.grid.is_uniform and scheme.grid.bits == 8
    return "int-quantized" if whole else "pack-quantized"


def assign(recipe: Recipe, anatomy: Anatomy) -> dict[str, MatrixMethod]:
    """Which method each linear gets, by the linear's name; linears without one are kept as they are.

    Raises:
        RecipeError: a role that this model does not have, or a step that matches nothing.
    """
    linears = [*anatomy.linears(), *(x for x in (anatomy.embedding, anatomy.head) if x is not None)]
    roles = {linear.role for linear in linears}
    assigned: dict[str, MatrixMethod] = {}
    for number, method, where in recipe.compressing:
        for role in where.role or ():
            if role not in roles:
                raise RecipeError(f"recipe {recipe.name}, step {number}: {unknown_word('role', role, roles)}")
        matched = [linear for linear in linears if where.matches(linear, len(anatomy.blocks))]
        if not matched:
            raise RecipeError(
                f"recipe {recipe.name}, step {number}: 'where' {dataclasses.asdict(where)} matches no linear of "
                f"this model; it has {len(anatomy.blocks)} blocks and the roles {', '.join(sorted(roles))}"
            )
        for linear in matched:
            assigned[linear.name] = method
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
