"""Chain: stages that follow each other, each from a model folder to a model folder; some train, some compress.

    name: qat-2bit
    stages:
      - compress: {steps: [{method: gptq, bits: 2, group_size: 32, asymmetric: true}]}
      - train: qat
        steps: 200
        learning_rate: 0.0003

`compress` names a shipped recipe or holds one; `train` names a training method, whose fields stand beside it. The first
stage reads the model that is given, every other one what the stage before wrote, and the last one writes the output.
The teacher, where none is named, is the model that the chain began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fettle.errors import RecipeError, unknown_word
from fettle.methods import registry
from fettle.methods.train import TRAIN_METHODS, Adapter, TrainMethod
from fettle.pipeline.recipe import Recipe, load_recipe, parse_recipe
from fettle.pipeline.recipe_yaml import named_file, parse_file


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: a training method, or a recipe that compresses."""

    method: TrainMethod | None = None
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """For people and folders."""
        return self.method.name if self.method is not None else "compress"

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_chain` reads back."""
        if self.method is not None:
            return {"train": self.method.name, **registry.to_fields(self.method)}  # type: ignore[arg-type]
        assert self.recipe is not None
        return {"compress": self.recipe.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Stages in order, at least one of which trains."""

    name: str
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_chain` reads back to an equal chain."""
        return {"name": self.name, "stages": [stage.to_dict() for stage in self.stages]}

    def to_yaml(self) -> str:
        """The chain as YAML, every default spelled out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_chain(path_or_name: str | Path) -> Chain:
    """Reads a chain from a file, or a shipped one by its name.

    Raises:
        RecipeError: no such file or name, no YAML, or something impossible inside.
    """
    return parse_file(named_file("chain", path_or_name, shipped_chains()), parse_chain)


def shipped_chains() -> list[Path]:
    """The chains that come with the package."""
    return sorted((Path(__file__).parent.parent / "recipes" / "chains").glob("*.yaml"))


def chain_from_method(name: str, fields: Mapping[str, Any]) -> Chain:
    """The one-line form: one training method."""
    return Chain(name=name, stages=(Stage(method=_method(name, fields)),))


def parse_chain(mapping: Any, origin: str) -> Chain:
    """Builds a chain from a mapping; `origin` names it in errors.

    Raises:
        RecipeError: an unknown key (with the nearest spelling), a value that cannot be, or stages that cannot follow
            each other.
    """
    if not isinstance(mapping, Mapping) or "stages" not in mapping:
        raise RecipeError(
            f"{origin}: a chain is a mapping with the key 'stages'; a recipe of steps is for fettle compress"
        )
    for key in mapping:
        if key not in ("name", "stages"):
            raise RecipeError(f"{origin}: {unknown_word('key of a chain', str(key), ('name', 'stages'))}")
    listed = mapping["stages"]
    if not isinstance(listed, list) or not listed:
        raise RecipeError(f"{origin}: 'stages' must be a list with at least one stage, got {listed!r}")
    stages = tuple(_parse_stage(stage, f"{origin}, stage {i + 1}") for i, stage in enumerate(listed))
    for number, stage in enumerate(stages[:-1], start=1):
        if isinstance(stage.method, Adapter) and not stage.method.merge:
            raise RecipeError(
                f"{origin}, stage {number}: an adapter is no model that the next stage could read; set merge: true, or "
                "let it be the last"
            )
    if not any(stage.method is not None for stage in stages):
        raise RecipeError(f"{origin}: no stage trains; use fettle compress")
    return Chain(name=str(mapping.get("name", Path(origin).stem)), stages=stages)


def _parse_stage(mapping: Any, origin: str) -> Stage:
    if not isinstance(mapping, Mapping) or ("train" in mapping) == ("compress" in mapping):
        raise RecipeError(f"{origin}: a stage is a mapping with the key 'train' or 'compress', got {mapping!r}")
    try:
        if "train" in mapping:
            return Stage(method=_method(str(mapping["train"]), {k: v for k, v in mapping.items() if k != "train"}))
        if len(mapping) > 1:
            raise RecipeError("compress: holds a recipe or its name, and nothing stands beside it")
        told = mapping["compress"]
        return Stage(recipe=load_recipe(told) if isinstance(told, str) else parse_recipe(told, "compress"))
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from None


def _method(name: str, fields: Mapping[str, Any]) -> TrainMethod:
    if name not in TRAIN_METHODS:
        raise RecipeError(unknown_word("training method", name, TRAIN_METHODS))
    return registry.build(TRAIN_METHODS[name], fields)
