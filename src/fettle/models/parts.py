"""The nouns of an anatomy: `Slot`, `Linear`, `Feed`, `Block`, `Anatomy`. How they are read: anatomy.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fettle.errors import UsageError
from fettle.models.sources import Residual

#: tensor-name endings that together stand for one matrix stored as codes
CODE_SUFFIXES = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale",
    ".weight_tensor_scale", ".weight_levels", ".weight_values",
    ".weight_sparse_values", ".weight_sparse_columns", ".weight_sparse_offsets",
    ".weight_factor_left", ".weight_factor_right",
    ".weight_mask", ".weight_mask_indices",
    ".input_scale", ".input_zero_point", ".input_global_scale",
)  # fmt: skip


#: roles of a block whose linears runtimes multiply as one matrix where they read the same inputs (vLLM's merged
#: projections)
FUSED_ROLES = (
    frozenset({"query", "key", "value"}), frozenset({"gate", "up"}), frozenset({"expert_gate", "expert_up"}),
)  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """Where a matrix lives in the transformers module: `parameter`[`index`][`rows`], transposed if Conv1D."""

    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Linear:
    """One matrix [out, in] of the model, whatever way it is stored."""

    name: str
    weight_name: str
    role: str
    block: int | None
    shape: tuple[int, int]
    slot: Slot
    input_group: str
    expert: int | None = None
    norm: str | None = None  # the norm through which it reads the residual stream, by its module's name on disk

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Feed:
    """A norm, or rows of a linear, whose channels are the inputs of one group of linears, and of nothing else.

    Dividing channel c by s and multiplying the columns that read it by s changes no output. The columns of grouped
    query heads share the channels of their key-value head.
    """

    input_group: str  # of all linears that read it
    weight_name: str
    bias_name: str | None  # divided with the weight
    linear: Linear | None  # None for a norm
    offset: float = 0.0  # a norm multiplies by offset + weight
    rows: tuple[int, int, int] | None = None  # of the linear: first, count, period; None for all
    repeats: tuple[int, int] = (1, 1)  # each run of so many channels is read so many times, one after the other

    def source_rows(self, out: int) -> list[int]:
        """The row of the linear, of `out` rows, behind each channel."""
        first, count, period = self.rows or (0, out, out)
        return [start + first + row for start in range(0, out, period) for row in range(count)]

    def channels(self, in_features: int) -> list[int]:
        """The channel that each column of the reading linears reads."""
        span, times = self.repeats
        return [column // (span * times) * span + column % span for column in range(in_features)]


@dataclass(frozen=True)
class Block:
    """One transformer layer: its matrices, and every checkpoint tensor that belongs to it."""

    index: int
    name: str  # the transformers module's name: "model.layers.0"
    linears: tuple[Linear, ...]
    tensors: tuple[str, ...]
    feeds: tuple[Feed, ...] = ()  # none where the family's table names none, and for families without a table


@dataclass(frozen=True)
class Anatomy:
    """A whole model: blocks in order, embedding and head, and the tensors outside the blocks."""

    family: str
    blocks: tuple[Block, ...]
    embedding: Linear | None
    head: Linear | None  # tied: its weight_name is the embedding's
    tied: bool
    tensors: tuple[str, ...]
    causal: bool
    parameters: Mapping[str, str]  # checkpoint tensor → transformers parameter, for what is not a linear
    blocks_return_tuple: bool = False
    residual: Residual | None = None  # its norm and tables by their names on disk; None: not known

    def linears(self) -> Iterator[Linear]:
        """The matrices of the blocks, in order; embedding and head are not among them."""
        for block in self.blocks:
            yield from block.linears

    def require_rows(self, lowest: int, highest: int) -> None:
        """Raises UsageError for token ids that are no rows of the embedding: the tokenizer is of another model."""
        rows = self.embedding.shape[0] if self.embedding is not None else None
        if rows is not None and not 0 <= lowest <= highest < rows:
            wrong = highest if highest >= rows else lowest
            raise UsageError(
                f"token id {wrong} is outside the embedding of {rows} rows; the tokenizer is of another model."
            )

    def find(self, name: str) -> Linear:
        """The linear called `name`, embedding and head included; KeyError if there is none."""
        for linear in (*self.linears(), self.embedding, self.head):
            if linear is not None and linear.name == name:
                return linear
        raise KeyError(name)
