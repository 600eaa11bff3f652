"""The widths of a model, and what has to be cut together where one of them shrinks.

    neurons   rows of up and gate (both halves of a fused one), the up's bias, columns of down; each expert its own
    heads     whole key-value groups: rows of query, key and value with their biases, columns of output; or, where one
              group is all there is, query heads inside it
    hidden    columns of everything that reads the residual stream, rows and biases of what writes into it, norms,
              embedding, head

Every cut is named by role, so a family needs nothing here; which families' configurations can say the new width is data
in `models/families.py`. Removed neurons and heads are exactly those whose output is taken as zero. Removed channels as
well: a root-mean-square norm over K of D channels is made the norm over D with D - K zeros by √(D/K) in its weight and
D/K in its epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.reshape.subject import Subject
from fettle.models.anatomy import Block, Linear, dimensions
from fettle.models.block_widths import WIDTHS_KEY
from fettle.models.families import FREE_HEAD_SIZE, FREE_WIDTH
from fettle.models.reshaped_config import with_sizes
from fettle.models.view import Cut, Index, View

READERS = frozenset(
    {"query", "key", "value", "query_key_value", "gate", "up", "gate_up", "router", "expert_gate", "expert_up"}
)
WRITERS = frozenset({"output", "down", "expert_down"})
_BEFORE_DOWN = frozenset({"up", "gate", "gate_up", "expert_up", "expert_gate"})


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """How many heads there are and how many share a key-value head."""

    heads: int
    kv_heads: int
    size: int

    @property
    def group(self) -> int:
        """Query heads a key-value head."""
        return self.heads // self.kv_heads


def head_shape(subject: Subject) -> HeadShape:
    """As the configuration says."""
    dims = dimensions(subject.checkpoint.config, subject.family)
    return HeadShape(heads=dims["heads"], kv_heads=dims["kv_heads"], size=dims["head_dim"])


def neuron_groups(block: Block) -> Iterator[tuple[Linear, list[Linear]]]:
    """Each matrix that reads neurons, with those that compute them: one pair a block, or one an expert."""
    for down in block.linears:
        if down.role in ("down", "expert_down"):
            yield down, [x for x in block.linears if x.role in _BEFORE_DOWN and x.expert == down.expert]


def attention_of(block: Block) -> tuple[Linear, list[Linear]]:
    """The output matrix, and those that compute queries, keys and values."""
    output = next(x for x in block.linears if x.role == "output")
    return output, [x for x in block.linears if x.role in ("query", "key", "value", "query_key_value")]


@dataclass
class Cuts:
    """Cuts by tensor, gathered and then made a view."""

    subject: Subject
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # symbol of `DIMENSIONS` → new number
    config: dict[str, object] = field(default_factory=dict)  # other keys that change

    def neurons(self, kept: Mapping[str, Tensor]) -> None:
        """Keeps these neurons: name of the matrix that reads them → positions."""
        for block in self.subject.anatomy.blocks:
            for down, before in neuron_groups(block):
                index = kept[down.name]
                self._columns(down, index)
                for linear in before:
                    fused = linear.role == "gate_up"
                    self._rows(linear, torch.cat([index, index + down.shape[1]]) if fused else index)
                self.sizes["mlp" if down.expert is None else "moe"] = len(index)

    def heads(self, kept: Mapping[str, Tensor], shape: HeadShape, new: HeadShape | None) -> None:
        """Keeps these query heads: name of the output matrix → positions; with the key-value heads that they read.
        `new` is what the configuration will say; None: nothing, as a table says it block by block.

        Raises:
            RecipeError: the family's configuration cannot say it.
        """
        if new is not None:
            require_free_heads(self.subject)
        span = torch.arange(shape.size)
        for block in self.subject.anatomy.blocks:
            output, before = attention_of(block)
            heads = kept[output.name]
            groups = torch.unique(heads // shape.group)  # sorted
            query, pair = ((chosen[:, None] * shape.size + span).flatten() for chosen in (heads, groups))
            self._columns(output, query)
            q, kv = shape.heads * shape.size, shape.kv_heads * shape.size
            for linear in before:
                fused = torch.cat([query, q + pair, q + kv + pair])
                self._rows(linear, {"query": query, "query_key_value": fused}.get(linear.role, pair))
        if new is not None:
            self.sizes |= {"heads": new.heads, "kv_heads": new.kv_heads}

    def by_block(self, neurons: Sequence[int], groups: Sequence[int], shape: HeadShape) -> None:
        """Says the widths block by block in place of one number for all."""
        self.sizes.pop("mlp", None)
        self.config[WIDTHS_KEY] = {
            "neurons": list(neurons), "heads": [count * shape.group for count in groups], "kv_heads": list(groups)
        }  # fmt: skip

    def hidden(self, index: Tensor) -> None:
        """Keeps these channels of the residual stream.

        Raises:
            RecipeError: not in this family.
        """
        require_free_width(self.subject)
        anatomy, family, checkpoint = self.subject.anatomy, self.subject.family, self.subject.checkpoint
        for linear in anatomy.linears():
            (self._rows if linear.role in WRITERS else self._columns)(linear, index)
        for table in (anatomy.embedding, None if anatomy.tied else anatomy.head):
            if table is not None:
                self._columns(table, index)
        width = len(index)
        assert anatomy.embedding is not None
        before = anatomy.embedding.shape[1]
        inside = [n for n, size in family.vectors if size == "hidden"]
        norms = [name for block in anatomy.blocks for name in block.tensors if name.endswith(tuple(inside))]
        norms += [n for n in anatomy.tensors if n.endswith(tuple(n for n, size in family.outside if size == "hidden"))]
        for name in norms:
            self.rows[name], self.factors[name] = index, math.sqrt(before / width)
        epsilon = checkpoint.config.get("rms_norm_eps", 1e-6)
        self.config["rms_norm_eps"] = epsilon * before / width
        self.sizes["hidden"] = width

    def view(self) -> View:
        """The narrowed model."""
        base = self.subject.checkpoint
        pieces = {
            name: Cut(name, self.rows.get(name), self.columns.get(name), self.factors.get(name, 1.0))
            for name in base.entries
        }
        return View.of(base, {**with_sizes(base.config, self.sizes), **self.config}, pieces)

    def _rows(self, linear: Linear, index: Index) -> None:
        assert index is not None
        (self.columns if linear.slot.transposed else self.rows)[linear.weight_name] = index
        bias = f"{linear.name}.bias"
        if bias in self.subject.checkpoint.entries:
            self.rows[bias] = index

    def _columns(self, linear: Linear, index: Index) -> None:
        assert index is not None
        (self.rows if linear.slot.transposed else self.columns)[linear.weight_name] = index


def require_free_heads(subject: Subject) -> None:
    """Raises RecipeError where a configuration cannot say fewer heads for the same width."""
    name = subject.family.name
    if name not in FREE_HEAD_SIZE:
        raise RecipeError(
            f"heads of a {name} model cannot go: its configuration has no head size of its own, so fewer heads would "
            f"mean wider ones. Families whose heads can go: {', '.join(sorted(FREE_HEAD_SIZE))}. Narrow the neurons "
            "instead"
        )


def require_free_width(subject: Subject) -> None:
    """Raises RecipeError where the hidden width cannot shrink."""
    name = subject.family.name
    if name not in FREE_WIDTH:
        raise RecipeError(
            f"the hidden width of a {name} model cannot shrink: its norms subtract a mean over all channels, or its "
            "embeddings are multiplied by the width's root, or its head size follows from the width. Families whose "
            f"width can shrink: {', '.join(sorted(FREE_WIDTH))}. Narrow neurons or drop layers instead"
        )
