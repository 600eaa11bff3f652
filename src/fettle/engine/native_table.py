"""A checkpoint as the table that the native decoder runs: matrices in the kernels' layout, norms, and plain numbers.

    checkpoint + anatomy (where matrices are) + families (what stands between them) + transformers' configuration
        → {"hidden": …, "blocks": [{"query": {"matrix": …, "bias": …}, "attention_norm": …}, …]}

Matrices that a family stores as one, query with key and value or gate with up, are cut into their rows: a row is codes
and scales of its own, so nothing is rounded again. One matrix as it was stored is in memory at a time, beside the
finished table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fettle.engine.native_families import (
    NativeFamily,
    activation_of,
    attention_scale,
    native_family,
    setting,
    window_of,
)
from fettle.errors import UsageError
from fettle.kernels.native import (
    coded_matrix,
    dense_matrix,
    packed_matrix,
    round_inputs,
    rounding_obstacle,
    runs_as_codes,
)
from fettle.kernels.native_sparse import masked_matrix
from fettle.models.anatomy import Anatomy
from fettle.models.block_widths import are_heads_alike, head_counts
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.module_tree import build_tree, parameter_of
from fettle.models.parts import Block, Linear
from fettle.models.rotary import Rotary, read_rotary
from fettle.models.shared_tensors import is_part
from fettle.models.storage import StoredScheme, read_packed, read_quantized, stored_schemes
from fettle.tensors.masked import MaskedTensor
from fettle.tensors.packed import can_stay_packed
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme
from fettle.tensors.weights import CompressedWeight

if TYPE_CHECKING:
    from fettle._native import Matrix, Pool

_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KINDS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sizes:
    """What the decoder is built of, in numbers."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int | None


def read_sizes(config: Any, anatomy: Anatomy) -> Sizes:
    """The sizes of a model from transformers' configuration of it."""
    heads = int(setting(config, _HEADS))
    embedding = anatomy.embedding
    if not are_heads_alike(getattr(config, "__dict__", {})):
        raise UsageError(
            "the native engine runs blocks with the same heads alone, and these differ; use --engine torch"
        )
    own = head_counts(config.__dict__) or (0, 0)
    assert embedding is not None, "a family with a row in native_families has an embedding"
    vocabulary, hidden = embedding.shape
    context = setting(config, ("max_position_embeddings", "n_positions"))
    return Sizes(
        hidden=hidden,
        heads=own[0] or heads,
        kv_heads=own[1] or int(setting(config, ("num_key_value_heads",), heads)),
        head_size=int(setting(config, ("head_dim",), hidden // heads)),
        vocabulary=vocabulary,
        context=None if context is None else int(context),
    )


class TableReader:
    """Reads one checkpoint into one table."""

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, pool: Pool) -> None:
        self.checkpoint, self.anatomy, self.pool = checkpoint, anatomy, pool
        self.family: NativeFamily = native_family(anatomy)
        self.stored = stored_schemes(checkpoint, anatomy)
        self.tree = build_tree(checkpoint, anatomy, torch.float32, "cpu")
        self.config: Any = self.tree.config
        self.sizes = read_sizes(self.config, anatomy)
        self.rotary: Rotary | None = read_rotary(self.tree)
        self._tied = frozenset(checkpoint.shared.values())
        self._kept: dict[tuple[str, tuple[int, ...] | None], Matrix] = {}

    def read(self) -> dict[str, Any]:
        """The table; see native/bindings/decoders.cpp for its keys.

        Raises:
            UsageError: something that the native decoder has no part for.
            CheckpointError: damaged tensors.
        """
        sizes, rotary = self.sizes, self.rotary
        embedding, head = self.anatomy.embedding, self.anatomy.head
        assert embedding is not None and head is not None
        table = self._matrix(embedding)
        context = sizes.context if self.family.positions is not None else None
        return {
            "hidden": sizes.hidden,
            "heads": sizes.heads,
            "kv_heads": sizes.kv_heads,
            "head_size": sizes.head_size,
            "vocabulary": sizes.vocabulary,
            "context": context or 0,
            "rotary_switch": 0 if rotary is None or rotary.switch is None else rotary.switch,
            "embedding_scale": sizes.hidden**0.5 if self.family.embedding_scaled else 1.0,
            "logit_cap": float(setting(self.config, ("final_logit_softcapping",), 0.0)),
            "rotaries": [] if rotary is None else [_rotary_entry(rotary)],
            "embedding": table,
            "positions": self._positions(),
            "head": table if self.anatomy.tied else self._matrix(head),
            "head_bias": self._bias(head),
            "last_norm": self._norm(self.anatomy.tensors, self.family.last_norm),
            "blocks": [self._block(block) for block in self.anatomy.blocks],
        }

    def _block(self, block: Block) -> dict[str, Any]:
        family, tensors = self.family, block.tensors
        by_role = {linear.role: linear for linear in block.linears if linear.expert is None}
        query_norm, key_norm = family.head_norms or (None, None)
        return {
            **self._attention(block, by_role),
            "attention_norm": self._norm(tensors, family.attention_norm),
            "query_norm": self._norm(tensors, query_norm),
            "key_norm": self._norm(tensors, key_norm),
            "after_attention_norm": self._norm(tensors, family.after_attention_norm),
            "mlp_norm": self._norm(tensors, family.mlp_norm),
            "after_mlp_norm": self._norm(tensors, family.after_mlp_norm),
            "attention_scale": attention_scale(self.config, block.index, self.sizes.head_size),
            "attention_cap": float(setting(self.config, ("attn_logit_softcapping",), 0.0)),
            "window": window_of(self.config, block.index),
            "rotary": -1 if self.rotary is None else 0,
            "parallel": bool(getattr(self.config, "use_parallel_residual", False)),
            "activation": activation_of(self.config),
            "mlp": None if "router" in by_role else self._mlp(by_role),
            "mixture": self._mixture(block, by_role) if "router" in by_role else None,
        }

    def _attention(self, block: Block, by_role: dict[str, Linear]) -> dict[str, Any]:
        output = self._linear(by_role["output"])
        fused = by_role.get("query_key_value")
        if fused is None:
            return {role: self._linear(by_role[role]) for role in ("query", "key", "value")} | {"output": output}
        values = next((feed.rows for feed in block.feeds if feed.linear is fused), None)
        rows = fused_rows(fused.shape[0], values or (0, 0, 0))
        names = ("query", "key", "value")
        return {name: self._linear(fused, rows[i]) for i, name in enumerate(names)} | {"output": output}

    def _mlp(self, by_role: dict[str, Linear], prefix: str = "") -> dict[str, Any]:
        down = self._linear(by_role[f"{prefix}down"])
        fused = by_role.get(f"{prefix}gate_up")
        if fused is not None:
            half = fused.shape[0] // 2
            gate, up = range(half), range(half, 2 * half)
            return {"gate": self._linear(fused, gate), "up": self._linear(fused, up), "down": down}
        gated = by_role.get(f"{prefix}gate")
        return {
            "gate": None if gated is None else self._linear(gated),
            "up": self._linear(by_role[f"{prefix}up"]),
            "down": down,
        }

    def _mixture(self, block: Block, by_role: dict[str, Linear]) -> dict[str, Any]:
        experts: dict[int, dict[str, Linear]] = {}
        for linear in block.linears:
            if linear.expert is not None:
                experts.setdefault(linear.expert, {})[linear.role] = linear
        return {
            "router": self._linear(by_role["router"]),
            "experts": [self._mlp(experts[number], "expert_") for number in sorted(experts)],
            "experts_per_token": int(self.config.num_experts_per_tok),
            "renormalize": self.family.renormalize or bool(getattr(self.config, "norm_topk_prob", False)),
        }

    def _linear(self, linear: Linear, rows: Sequence[int] | None = None) -> dict[str, Any]:
        return {"matrix": self._matrix(linear, rows), "bias": self._bias(linear, rows)}

    def _matrix(self, linear: Linear, rows: Sequence[int] | None = None) -> Matrix:
        """The matrix in the kernels' layout; one that several blocks share is in memory once."""
        source = self.checkpoint.shared.get(linear.weight_name, linear.weight_name)
        if is_part(source) or source not in self._tied:
            return self._laid_out(linear, rows)
        key = source, None if rows is None else tuple(rows)
        if key not in self._kept:
            self._kept[key] = self._laid_out(linear, rows)
        return self._kept[key]

    def _laid_out(self, linear: Linear, rows: Sequence[int] | None) -> Matrix:
        stored = self.stored.get(linear.name)
        if stored is not None:
            check_inputs(linear.name, stored)
            scheme = stored.scheme
            stays = isinstance(scheme, Scheme) and can_stay_packed(scheme, stored.storage) and runs_as_codes(scheme)
            if stays and scheme.activations is None:
                packed = read_packed(self.checkpoint, linear, stored)
                return packed_matrix(packed if rows is None else packed.rows(_span(rows)), self.pool)
            found = read_quantized(self.checkpoint, linear, stored)
            whole = isinstance(found, QuantizedTensor) and (rows is None or found.remainder is None)
            if isinstance(found, QuantizedTensor) and whole:
                return self._reading(coded_matrix(_rows_of(found, rows), self.pool), found)
            if isinstance(found, MaskedTensor):
                return masked_matrix(found, self.pool, None if rows is None else _span(rows))
            weight = found.dequantize()  # vector codes, pieces with a remainder: no kernel has them yet
            return self._reading(dense_matrix(weight if rows is None else weight[_span(rows)], self.pool), found)
        weight = self.checkpoint.read(linear.weight_name)
        check_finite(linear.weight_name, weight)
        weight = weight.T if linear.slot.transposed else weight
        if rows is not None:
            weight = weight[_span(rows)]
        return dense_matrix(weight if weight.dtype in _KINDS else weight.float(), self.pool)

    def _reading(self, matrix: Matrix, weight: CompressedWeight) -> Matrix:
        """The matrix, reading its inputs as the checkpoint quantizes them where it does."""
        if not isinstance(weight, QuantizedTensor) or weight.scheme.activations is None:
            return matrix
        return round_inputs(matrix, weight.scheme.activations, weight.input_scale)

    def _bias(self, linear: Linear, rows: Sequence[int] | None = None) -> NDArray[np.float32] | None:
        name = f"{linear.weight_name.removesuffix('.weight')}.bias"
        parameter = self.anatomy.parameters.get(name)
        if parameter is None or parameter_of(self.tree, parameter) is None:  # what the model has no place for
            return None
        bias = self._vector(name)
        return bias if rows is None else np.ascontiguousarray(bias[list(rows)])

    def _norm(self, tensors: Sequence[str], name: str | None) -> dict[str, Any] | None:
        if name is None:
            return None
        weight = next(found for found in tensors if found.endswith(f"{name}.weight"))
        kind = self.family.norm
        return {
            "kind": kind,
            "weight": self._vector(weight) + np.float32(self.family.norm_offset),
            "bias": self._vector(weight.removesuffix("weight") + "bias") if kind == "layer" else None,
            "eps": float(setting(self.config, _EPS)),
        }

    def _positions(self) -> Matrix | None:
        if self.family.positions is None:
            return None
        name = next(found for found in self.anatomy.tensors if found.endswith(f"{self.family.positions}.weight"))
        values = self.checkpoint.read(name)
        check_finite(name, values)
        return dense_matrix(values if values.dtype in _KINDS else values.float(), self.pool)

    def _vector(self, name: str) -> NDArray[np.float32]:
        values: Tensor = self.checkpoint.read(name)
        check_finite(name, values)
        found: NDArray[np.float32] = values.float().contiguous().numpy()
        return found


def fused_rows(out: int, values: tuple[int, int, int]) -> tuple[list[int], list[int], list[int]]:
    """The rows of query, key and value in a matrix that holds all three, `out` rows high.

    `values` (first, count, period) are the value's rows: each period has the query's first, then as many of the key as
    of the value.
    """
    first, count, period = values
    cuts = ((0, first - count), (first - count, first), (first, first + count))
    query, key, value = (
        [start + row for start in range(0, out, period) for row in range(low, high)] for low, high in cuts
    )
    return query, key, value


def check_inputs(name: str, stored: StoredScheme) -> None:
    """Raises UsageError for a linear that quantizes its inputs as the data plane cannot."""
    activations = stored.scheme.activations
    obstacle = None if activations is None else rounding_obstacle(activations)
    if obstacle is not None:
        raise UsageError(f"{name}: {obstacle}")


def _span(rows: Sequence[int]) -> Any:
    """Rows as what indexes a tensor: a slice where they follow each other."""
    whole = list(rows)
    return slice(whole[0], whole[-1] + 1) if whole == list(range(whole[0], whole[-1] + 1)) else whole


def _rows_of(weight: QuantizedTensor, rows: Sequence[int] | None) -> QuantizedTensor:
    """Some rows of a compressed weight, rounded as they were; raises UsageError for one with a remainder."""
    if rows is None:
        return weight
    if weight.remainder is not None:
        raise UsageError(
            "a matrix of query, key and value in one with a remainder beside its codes is more than the native engine "
            "cuts; use --engine torch"
        )
    span = _span(rows)
    shared = weight.shared if weight.scheme.granularity == "tensor" else weight.shared.rows(span, weight.scheme)
    return QuantizedTensor(
        codes=weight.codes[span],
        scale=shared.scale,
        zero_point=shared.zero_point,
        levels=shared.levels,
        scheme=weight.scheme,
        tensor_scale=weight.tensor_scale,
    )


def _rotary_entry(rotary: Rotary) -> dict[str, Any]:
    return {
        "frequencies": rotary.frequencies,
        "long_frequencies": rotary.long_frequencies,
        "factor": rotary.factor,
        "long_factor": rotary.factor,
    }
