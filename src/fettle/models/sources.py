"""Words for a family's table: what gives out the inputs of which matrices, channel by channel.

    norm → linears      norm.weight / s   (and its bias),  columns of every linear that reads it · s
    linear → linear     rows / s          (and its bias),  columns of the linear behind it · s

Both leave the model's function as it was, whatever the factors s. Methods that choose s are in `methods/quantize/`, and
`pipeline/rescaling.py` moves the factors. `Residual` says the same of the residual stream, which can be rotated as a
whole (`rotated.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Source:
    """What gives out, channel by channel, the inputs of some matrices: dividing it and multiplying their columns by the
    same factors changes nothing.

    An entry promises that nobody else reads what it gives out. So there is none for a norm that a router reads too
    (routers are not compressed, and a rounded router sends tokens elsewhere), for a norm whose output is also the
    residual (BERT), and across an activation function.

    Attributes:
        name: the norm's or the matrix's module name inside its block.
        reads: the key of the rows that read it.
        offset: of a norm that multiplies by offset + weight; None for a matrix.
        rows: of a matrix: its rows that are read, as symbols (first, count, of how many that repeat); None for all.
        heads: whether the channels are those of key-value heads, which query heads share.
    """

    name: str
    reads: str
    offset: float | None = None
    rows: tuple[str, str, str] | None = None
    heads: bool = False


def norm(name: str, reads: str, offset: float = 0.0) -> Source:
    """A norm in front of matrices."""
    return Source(name=name, reads=reads, offset=offset)


def values(name: str, reads: str, rows: tuple[str, str, str] | None = None) -> Source:
    """Attention's weighted mean keeps the channels of the values apart: each head's go to the output's columns."""
    return Source(name=name, reads=reads, rows=rows, heads=True)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The residual stream: which norms stand between it and the matrices that read it.

    Every matrix but those of the roles in `WRITERS` reads it, through one of these norms; those write to it.

    Attributes:
        attention: in front of query, key and value.
        mlp: in front of gate and up, routers and experts.
        final: behind the blocks, in front of the head; outside the blocks.
        centred: whether the norms take the mean away first (LayerNorm).
        tables: [anything, hidden], outside the blocks, whose rows are added to it: position embeddings.
        refused: why it cannot be rotated; empty where it can.
    """

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    final: str = "norm"
    centred: bool = False
    tables: tuple[str, ...] = ()
    refused: str = ""

    def norm_of(self, role: str) -> str | None:
        """The norm through which matrices of this role read the stream; None for those that write to it."""
        return None if role in WRITERS else self.attention if role in _READ_BY_ATTENTION else self.mlp


WRITERS = frozenset({"output", "down", "expert_down"})
_READ_BY_ATTENTION = frozenset({"query", "key", "value", "query_key_value"})
PRE_NORM = Residual()  # Llama's, and of most families since
GPT_RESIDUAL = Residual(attention="ln_1", mlp="ln_2", final="ln_f", centred=True, tables=("wpe.weight",))

OF_ATTENTION = (norm("input_layernorm", "self_attn.qkv"), values("self_attn.v_proj", "self_attn.o_proj"))
OF_GATED_MLP = (
    norm("post_attention_layernorm", "mlp.gate_up"),
    Source(name="mlp.up_proj", reads="mlp.down_proj"),  # behind it stands a product with the gate, no function
)
