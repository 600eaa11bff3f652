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

A step that puts the whole model into other coordinates (`- method: rotation`) stands before all that compress, once and
without `where`: the steps behind it see the model as it leaves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from fettle.errors import RecipeError, unknown_word
from fettle.methods import registry
from fettle.methods.protocols import BasisMethod, LabelledMethod, MatrixMethod
from fettle.methods.registry import Method
from fettle.methods.reshape.subject import ModelMethod
from fettle.models.anatomy import Anatomy
from fettle.pipeline.recipe_yaml import named_file, parse_file, refuse_unknown
from fettle.pipeline.where import Where, parse_where
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.scheme import Scheme

Storage = Literal["pack-quantized", "int-quantized", "dense"]  # dense: pruned weights alone, zeros written out
Allocation = Literal["uniform", "global", "sensitivity", "outliers"]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The text that methods look at, cut into windows."""

    windows: int = field(default=128, metadata={"help": "how many windows of text", "minimum": 1})
    length: int = field(default=256, metadata={"help": "tokens a window", "minimum": 2})
    seed: int = field(default=0, metadata={"help": "which windows are drawn", "minimum": 0, "maximum": 2**63 - 1})
    text: str | None = field(default=None, metadata={"help": "UTF-8 text file; without it the embedded text"})
    images: str | None = field(
        default=None, metadata={"help": "for image classifiers: a folder, an .npz or .safetensors file, or shapes"}
    )
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
    """An ordered list of steps, the calibration and the storage format.

    `allocation` says how the share that a single pruning step prunes is spread over its linears; `search/allocation.py`
    turns any but "uniform" into a recipe with a step for each linear before a run is prepared.
    """

    name: str
    steps: tuple[Step, ...]
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    storage: Storage = "pack-quantized"
    allocation: Allocation = "uniform"
    basis: BasisMethod | None = None  # what the whole model passes through before the steps that compress

    @property
    def reshaping(self) -> tuple[ModelMethod, ...]:
        """The methods that give the model another shape, in order; they come first."""
        return tuple(step.method for step in self.steps if registry.reshapes(step.method))

    @property
    def compressing(self) -> tuple[tuple[int, MatrixMethod, Where], ...]:
        """The steps that compress linears: number in the recipe, from 1, method and where."""
        return tuple(
            (number, cast(MatrixMethod, step.method), step.where)
            for number, step in enumerate(self.steps, start=1 if self.basis is None else 2)
            if not (registry.reshapes(step.method) or registry.prunes_networks(step.method))
        )

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_recipe` reads back to an equal recipe."""
        steps: list[dict[str, Any]] = []
        for step in self.steps:
            where = {k: v for k, v in dataclasses.asdict(step.where).items() if v is not None}
            if "role" in where:
                where["role"] = list(where["role"])
            entry: dict[str, Any] = {"method": step.method.name, **registry.to_fields(step.method)}
            steps.append({**entry, "where": where} if where else entry)
        if self.basis is not None:  # behind the steps that reshape, before those that compress
            steps.insert(len(self.reshaping), {"method": self.basis.name, **registry.to_fields(self.basis)})
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
    return parse_file(named_file("recipe", path_or_name, shipped_recipes()), parse_recipe)


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
    refuse_unknown(mapping, ("name", "calibration", "storage", "allocation", "steps"), origin, "recipe key")
    steps = mapping.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError(f"{origin}: 'steps' must be a list with at least one step, got {steps!r}")
    storage = mapping.get("storage", "pack-quantized")
    if storage not in get_args(Storage):
        raise RecipeError(f"{origin}: {unknown_word('storage', str(storage), get_args(Storage))}")
    place, basis = _parse_basis(steps, origin)
    allocation = mapping.get("allocation", "uniform")
    if allocation not in get_args(Allocation):
        raise RecipeError(f"{origin}: {unknown_word('allocation', str(allocation), get_args(Allocation))}")
    recipe = Recipe(
        name=str(mapping.get("name", Path(origin).stem)),
        basis=basis,
        steps=tuple(_parse_step(step, f"{origin}, step {i + 1}") for i, step in enumerate(steps) if i != place),
        calibration=_parse_calibration(mapping.get("calibration") or {}, origin),
        storage=storage,
        allocation=allocation,
    )
    check_recipe(recipe, origin)
    return recipe


def check_recipe(recipe: Recipe, origin: str) -> None:
    """Checks that storage, allocation, basis and steps fit together, and that the steps' order is possible.

    Raises:
        RecipeError: they do not.
    """
    _check_order(recipe, origin)
    schemes = [(method.name, method.scheme("float32")) for _, method, _ in recipe.compressing]
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


def _check_order(recipe: Recipe, origin: str) -> None:
    """Raises RecipeError for a reshaping step behind one that compresses or with a `where`; a basis for nothing."""
    if recipe.basis is not None and not recipe.compressing:
        raise RecipeError(
            f"{origin}: {recipe.basis.name} alone makes nothing smaller; add a step that compresses, such as: - "
            "method: gptq"
        )
    for before, step in zip((None, *recipe.steps), recipe.steps, strict=False):
        if registry.prunes_networks(step.method) and (len(recipe.steps) > 1 or step.where != Where()):
            raise RecipeError(
                f"{origin}: {step.method.name} is for image classifiers, and the whole of one: make it the only step, "
                "without 'where'"
            )
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
    if registry.reshapes(method) or registry.prunes_networks(method):
        return Recipe(name=method.label(), steps=(Step(method=method),), calibration=checked)
    method = cast(MatrixMethod, method)
    title = method.label() if isinstance(method, LabelledMethod) else _title(method)
    return Recipe(name=title, steps=(Step(method=method),), calibration=checked, storage=_usual_storage(method))


def with_basis(recipe: Recipe, basis: BasisMethod) -> Recipe:
    """The recipe with `basis` before its steps; RecipeError where it has one already."""
    if recipe.basis is not None:
        raise RecipeError(f"the recipe {recipe.name} has a step {recipe.basis.name} already; leave out --rotate")
    found = dataclasses.replace(recipe, basis=basis, name=f"{basis.name}-{recipe.name}")
    check_recipe(found, recipe.name)
    return found


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


def _parse_basis(steps: list[Any], origin: str) -> tuple[int | None, BasisMethod | None]:
    """The method for the whole model, and which step it is; RecipeError where it stands elsewhere than first, steps
    that reshape aside.
    """
    names = [str(step.get("method")) if isinstance(step, Mapping) else "" for step in steps]
    place = next((i for i, name in enumerate(names) if name not in registry.MODEL_METHODS), len(names))
    for number, name in enumerate(names, start=1):
        if name in registry.BASES and number - 1 != place:
            raise RecipeError(
                f"{origin}, step {number}: {name} is for the whole model, before anything is compressed; make it the "
                "first step, behind those alone that reshape the model, and the only one of its kind"
            )
    if place == len(names) or names[place] not in registry.BASES:
        return None, None
    for name in names[place + 1 :]:
        if name in registry.MODEL_METHODS:
            raise RecipeError(
                f"{origin}: {name} gives the model another shape, so it comes before {names[place]}, which turns the "
                "model as it then is; change the order of the steps"
            )
    where = f"{origin}, step {place + 1}"
    if "where" in steps[place]:
        raise RecipeError(
            f"{where}: {names[place]} is for the whole model, all linears at once: leave out 'where' there; the "
            "steps behind it may have one"
        )
    try:
        fields = {key: value for key, value in steps[place].items() if key != "method"}
        return place, registry.basis_from_fields(names[place], fields)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _parse_step(mapping: Any, origin: str) -> Step:
    if not isinstance(mapping, Mapping) or "method" not in mapping:
        raise RecipeError(f"{origin}: a step is a mapping with the key 'method', got {mapping!r}")
    fields = {key: value for key, value in mapping.items() if key not in ("method", "where")}
    try:
        method = registry.from_fields(str(mapping["method"]), fields)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from None
    return Step(method=method, where=parse_where(mapping.get("where") or {}, origin))


def _parse_calibration(mapping: Any, origin: str) -> CalibrationOptions:
    if not isinstance(mapping, Mapping):
        raise RecipeError(
            f"{origin}: 'calibration' is a mapping with windows, length, seed, text or images, got {mapping!r}"
        )
    allowed = {f.name: f for f in dataclasses.fields(CalibrationOptions)}
    refuse_unknown(mapping, allowed, origin, "key of 'calibration'")
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
    files = {key: None if mapping.get(key) is None else str(mapping[key]) for key in ("text", "images")}
    return CalibrationOptions(**{**mapping, **files})
