"""What the signals look at while a model runs: logits, states, attention maps, value vectors; no more than asked.

Values are the outputs of the last block's linears of role `value`, taken as they come out; attention maps need the
plain implementation of attention, which a model is switched to when they are asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from fettle.errors import RecipeError
from fettle.models.anatomy import Anatomy
from fettle.models.loading import LoadedModel

RELATION_STRIDE = 16  # every how manieth token's state is a sample of the relations


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What one model gave for [batch, tokens].

    Attributes:
        logits: [batch, tokens, vocab].
        hidden: the state after each block, [batch, tokens, width] each (the last one behind the final norm, as
            transformers gives it); empty where nobody asked.
        attention: [batch, heads, tokens, tokens] of each block; empty where nobody asked.
        values: [batch, tokens, width] of the last block; None where nobody asked.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    attention: tuple[Tensor, ...] = ()
    values: Tensor | None = None

    def samples(self) -> Tensor:
        """Every 16th token's last state, [samples, width]: what relations and distances are taken between."""
        return self.hidden[-1][:, RELATION_STRIDE - 1 :: RELATION_STRIDE].flatten(0, 1)


def base_tree(loaded: LoadedModel) -> nn.Module:
    """The transformers model, below an adapter that may stand around it."""
    model: Any = loaded.model
    found: nn.Module = model.get_base_model() if hasattr(model, "peft_config") else getattr(model, "tree", model)
    return found


def value_path(anatomy: Anatomy) -> str:
    """Where the last block's linear for the values is in the tree.

    Raises:
        RecipeError: there is none for the values alone.
    """
    found = [linear for linear in anatomy.blocks[-1].linears if linear.role == "value"]
    if len(found) != 1:
        raise RecipeError(f"values: a {anatomy.family} model has no linear for the values alone; set values: 0")
    return found[0].slot.parameter.removesuffix(".weight")


def shared_units(tree: nn.Module, anatomy: Anatomy, signals: Collection[str]) -> list[nn.Module]:
    """The modules whose parameters are gathered together where a model is shared out: embedding, blocks, head.

    A block's parameters come back when a gradient reaches its output. Where only what happens inside of blocks is
    looked at, the last one's output is not used, so that block stays with the rest.
    """
    used = anatomy.blocks if set(signals) - {"values", "attention"} else anatomy.blocks[:-1]
    ends = [linear.slot.parameter for linear in (anatomy.embedding, anatomy.head) if linear is not None]
    names = [block.name for block in used] + [name.rpartition(".")[0] for name in ends]
    return [tree.get_submodule(name) for name in dict.fromkeys(names)]


class Observed:
    """A model that tells what the signals ask for.

    Raises:
        RecipeError: the model has no linear for the values alone, or its attention cannot be seen.
    """

    def __init__(self, model: nn.Module, tree: nn.Module, anatomy: Anatomy, signals: Collection[str]) -> None:
        """`tree` is the transformers model, with the anatomy's names; `model` what is called, which may wrap it."""
        self.model = model
        self.depth = len(anatomy.blocks)
        self.units = partial(shared_units, tree, anatomy, signals)
        self._hidden = bool({"features", "relations", "distances"} & set(signals))
        self._attention = "attention" in signals
        self._values: list[Tensor] = []
        self._seen = "values" in signals
        if self._attention:
            tree.set_attn_implementation("eager")  # type: ignore[operator]
        if self._seen:
            tree.get_submodule(value_path(anatomy)).register_forward_hook(lambda _, __, out: self._values.append(out))

    def __call__(self, input_ids: Tensor) -> Outputs:
        """Runs the model on int64 [batch, tokens]."""
        asked: dict[str, Any] = {"output_hidden_states": self._hidden, "output_attentions": self._attention}
        self._values.clear()
        out = self.model(input_ids=input_ids, use_cache=False, **{key: value for key, value in asked.items() if value})
        skipped = out.logits.shape[1] - input_ids.shape[1]  # virtual tokens of a prompt stand in front
        values = self._values.pop() if self._seen else None
        return Outputs(
            logits=out.logits[:, skipped:] if skipped else out.logits,
            hidden=tuple(out.hidden_states[1:]) if self._hidden else (),
            attention=tuple(out.attentions) if self._attention else (),
            values=values,
        )
