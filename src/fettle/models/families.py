"""Architecture knowledge as data: one small table per family of models.

Why tables: a method must never ask which model it has. What differs between families is where the blocks are, what the
matrices in them are called, which of them read the same inputs, and in which shape they lie; that is all data, and
`anatomy.py` reads every family with the same few lines. Parity tests run each table against `transformers` on a tiny
random model.

How to read a row: `name` is the matrix's module name inside its block, as checkpoints on the hub spell it; `{e}`
stands for an expert's number. `reads` is the key of the activations it multiplies: rows with the same key share their
statistics. `shape` is [out, in] in symbols (`q`: query heads × head size, `kv`: key-value heads × head size).
`parameter` is where transformers 5 holds it when that is another place: experts live in one 3-D parameter, gate and up
stacked in its halves. `bias` is the key of config.json that says whether it has a bias, and what holds where it is
silent. `sources` says what gives out the inputs of which rows, so that a method may move a factor between them;
`residual` where the residual stream is read, so that it may be rotated.

A new family costs one `Family(...)` below and one line in the parity test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fettle.errors import UnknownFamilyError, unknown_word
from fettle.models.sources import GPT_RESIDUAL, OF_ATTENTION, OF_GATED_MLP, PRE_NORM, Residual, Source, norm, values

#: symbol → the keys of config.json that give it, first found wins. Products and defaults are in anatomy.py.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "mlp": ("intermediate_size", "n_inner"),
    "moe": ("moe_intermediate_size", "intermediate_size"),
    "experts": ("num_local_experts", "num_experts"),
    "vocab": ("vocab_size",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One matrix of a block; see the module docstring."""

    name: str
    role: str
    reads: str
    shape: tuple[str, str]
    parameter: str | None = None
    half: int | None = None
    kind: Literal["any", "dense", "moe"] = "any"
    bias: tuple[str, bool] = ("", False)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that fettle knows of one architecture."""

    name: str
    model_types: tuple[str, ...]
    base_class: str  # the class without a head: its parameters lack `prefix`
    rows: tuple[Row, ...]
    vectors: tuple[tuple[str, str], ...]  # required 1-D tensors of a block: name, length
    prefix: str = "model."
    blocks: str = "layers"
    renames: tuple[tuple[str, str], ...] = ()  # inside a module name: the checkpoint's spelling → transformers'
    embedding: str = "embed_tokens"
    outside: tuple[tuple[str, str], ...] = (("norm.weight", "hidden"),)
    head: str | None = "lm_head"
    head_parameter: str = "lm_head.weight"
    beside_prefix: tuple[str, ...] = ("lm_head.",)  # names outside the base model: they never take the prefix
    transposed: bool = False  # Conv1D: [in, out] on disk and in memory
    causal: bool = True
    tied_by_default: bool = False
    default_head_dim: int | None = None
    blocks_return_tuple: bool = False
    sources: tuple[Source, ...] = ()
    residual: Residual | None = None  # None: nobody looked, so it is not rotated


_ALWAYS, _NEVER = ("", True), ("", False)
_AS_ATTENTION_SAYS, _AS_MLP_SAYS = ("attention_bias", False), ("mlp_bias", False)


def _attention(
    prefix: str = "self_attn.",
    output: str = "o_proj",
    *,
    bias: tuple[str, bool] = _NEVER,
    output_bias: tuple[str, bool] | None = None,
) -> tuple[Row, ...]:
    """Separate query, key and value: nearly every family since 2020."""
    reads, last = f"{prefix}qkv", bias if output_bias is None else output_bias
    return (
        Row(name=f"{prefix}q_proj", role="query", reads=reads, shape=("q", "hidden"), bias=bias),
        Row(name=f"{prefix}k_proj", role="key", reads=reads, shape=("kv", "hidden"), bias=bias),
        Row(name=f"{prefix}v_proj", role="value", reads=reads, shape=("kv", "hidden"), bias=bias),
        Row(name=f"{prefix}{output}", role="output", reads=f"{prefix}{output}", shape=("hidden", "q"), bias=last),
    )


def _gated_mlp(kind: Literal["any", "dense"] = "any", *, bias: tuple[str, bool] = _NEVER) -> tuple[Row, ...]:
    """down(activation(gate(x)) · up(x))."""
    return (
        Row(name="mlp.gate_proj", role="gate", reads="mlp.gate_up", shape=("mlp", "hidden"), kind=kind, bias=bias),
        Row(name="mlp.up_proj", role="up", reads="mlp.gate_up", shape=("mlp", "hidden"), kind=kind, bias=bias),
        Row(name="mlp.down_proj", role="down", reads="mlp.down_proj", shape=("hidden", "mlp"), kind=kind, bias=bias),
    )


def _experts(module: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and its experts; an expert's matrices read that expert's own tokens."""
    stem, into, out = module + ".experts.{e}.", ("moe", "hidden"), ("hidden", "moe")
    fused, last = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    reads = stem + "gate_up"
    return (
        Row(name=f"{module}.gate", role="router", reads=f"{module}.gate", shape=("experts", "hidden"), kind="moe"),
        Row(name=stem + gate, role="expert_gate", reads=reads, shape=into, parameter=fused, half=0, kind="moe"),
        Row(name=stem + up, role="expert_up", reads=reads, shape=into, parameter=fused, half=1, kind="moe"),
        Row(name=stem + down, role="expert_down", reads=stem + down, shape=out, parameter=last, kind="moe"),
    )


_TWO_NORMS = (("input_layernorm.weight", "hidden"), ("post_attention_layernorm.weight", "hidden"))
_QK_NORMS = (("self_attn.q_norm.weight", "head_dim"), ("self_attn.k_norm.weight", "head_dim"))
_GPT_NORMS = (("ln_1.weight", "hidden"), ("ln_1.bias", "hidden"), ("ln_2.weight", "hidden"), ("ln_2.bias", "hidden"))

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    base_class="LlamaModel",
    rows=_attention(bias=_AS_ATTENTION_SAYS) + _gated_mlp(bias=_AS_MLP_SAYS),
    vectors=_TWO_NORMS,
    sources=OF_ATTENTION + OF_GATED_MLP,
    residual=PRE_NORM,
)
MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    base_class="MistralModel",
    rows=_attention() + _gated_mlp(),
    vectors=_TWO_NORMS,
    sources=OF_ATTENTION + OF_GATED_MLP,
    residual=PRE_NORM,
)
QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    base_class="Qwen2Model",
    rows=_attention(bias=_ALWAYS, output_bias=_NEVER) + _gated_mlp(),
    vectors=_TWO_NORMS,
    sources=OF_ATTENTION + OF_GATED_MLP,
    residual=PRE_NORM,
)
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    base_class="Qwen3Model",
    rows=_attention(bias=_AS_ATTENTION_SAYS) + _gated_mlp(),
    vectors=_TWO_NORMS + _QK_NORMS,
    default_head_dim=128,
    sources=OF_ATTENTION + OF_GATED_MLP,
    residual=PRE_NORM,
)
PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    base_class="Phi3Model",
    rows=(
        Row(name="self_attn.qkv_proj", role="query_key_value", reads="self_attn.qkv", shape=("q+2kv", "hidden")),
        Row(name="self_attn.o_proj", role="output", reads="self_attn.o_proj", shape=("hidden", "q")),
        Row(name="mlp.gate_up_proj", role="gate_up", reads="mlp.gate_up", shape=("2mlp", "hidden")),
        Row(name="mlp.down_proj", role="down", reads="mlp.down_proj", shape=("hidden", "mlp")),
    ),
    vectors=_TWO_NORMS,
    sources=(
        norm("input_layernorm", "self_attn.qkv"),
        values("self_attn.qkv_proj", "self_attn.o_proj", ("q+kv", "kv", "q+2kv")),
        norm("post_attention_layernorm", "mlp.gate_up"),
        Source(name="mlp.gate_up_proj", reads="mlp.down_proj", rows=("mlp", "mlp", "2mlp")),
    ),
    residual=PRE_NORM,
)
GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    base_class="Gemma2Model",
    rows=_attention(bias=_AS_ATTENTION_SAYS) + _gated_mlp(),
    vectors=(
        *_TWO_NORMS,
        ("pre_feedforward_layernorm.weight", "hidden"),
        ("post_feedforward_layernorm.weight", "hidden"),
    ),
    tied_by_default=True,
    default_head_dim=256,
    sources=(
        norm("input_layernorm", "self_attn.qkv", 1.0),
        values("self_attn.v_proj", "self_attn.o_proj"),
        norm("pre_feedforward_layernorm", "mlp.gate_up", 1.0),
        Source(name="mlp.up_proj", reads="mlp.down_proj"),
    ),
    residual=Residual(
        refused="its norms behind attention and MLP multiply channel by channel what is added to the residual stream"
    ),
)
GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    base_class="GPT2Model",
    prefix="transformer.",
    blocks="h",
    rows=(
        Row(name="attn.c_attn", role="query_key_value", reads="attn.qkv", shape=("3hidden", "hidden"), bias=_ALWAYS),
        Row(name="attn.c_proj", role="output", reads="attn.c_proj", shape=("hidden", "hidden"), bias=_ALWAYS),
        Row(name="mlp.c_fc", role="up", reads="mlp.c_fc", shape=("mlp", "hidden"), bias=_ALWAYS),
        Row(name="mlp.c_proj", role="down", reads="mlp.c_proj", shape=("hidden", "mlp"), bias=_ALWAYS),
    ),
    vectors=_GPT_NORMS,
    embedding="wte",
    outside=(("ln_f.weight", "hidden"), ("ln_f.bias", "hidden")),
    transposed=True,
    tied_by_default=True,
    sources=(
        norm("ln_1", "attn.qkv"),
        values("attn.c_attn", "attn.c_proj", ("2hidden", "hidden", "3hidden")),
        norm("ln_2", "mlp.c_fc"),
    ),
    residual=GPT_RESIDUAL,
)
GPT_NEO = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
    base_class="GPTNeoModel",
    prefix="transformer.",
    blocks="h",
    rows=(
        *_attention("attn.attention.", "out_proj", output_bias=_ALWAYS),
        Row(name="mlp.c_fc", role="up", reads="mlp.c_fc", shape=("mlp", "hidden"), bias=_ALWAYS),
        Row(name="mlp.c_proj", role="down", reads="mlp.c_proj", shape=("hidden", "mlp"), bias=_ALWAYS),
    ),
    vectors=_GPT_NORMS,
    embedding="wte",
    outside=(("ln_f.weight", "hidden"), ("ln_f.bias", "hidden")),
    tied_by_default=True,
    blocks_return_tuple=True,
    sources=(
        norm("ln_1", "attn.attention.qkv"),
        values("attn.attention.v_proj", "attn.attention.out_proj"),
        norm("ln_2", "mlp.c_fc"),
    ),
    residual=GPT_RESIDUAL,
)
GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    base_class="GPTNeoXModel",
    prefix="gpt_neox.",
    rows=(
        Row(
            name="attention.query_key_value",
            role="query_key_value",
            reads="attention.qkv",
            shape=("3hidden", "hidden"),
            bias=("attention_bias", True),
        ),
        Row(
            name="attention.dense",
            role="output",
            reads="attention.dense",
            shape=("hidden", "hidden"),
            bias=("attention_bias", True),
        ),
        Row(name="mlp.dense_h_to_4h", role="up", reads="mlp.dense_h_to_4h", shape=("mlp", "hidden"), bias=_ALWAYS),
        Row(name="mlp.dense_4h_to_h", role="down", reads="mlp.dense_4h_to_h", shape=("hidden", "mlp"), bias=_ALWAYS),
    ),
    vectors=(*_TWO_NORMS, ("input_layernorm.bias", "hidden"), ("post_attention_layernorm.bias", "hidden")),
    embedding="embed_in",
    outside=(("final_layer_norm.weight", "hidden"), ("final_layer_norm.bias", "hidden")),
    head="embed_out",
    beside_prefix=("embed_out.", "lm_head."),
    renames=(("embed_out.", "lm_head."),),
    sources=(
        norm("input_layernorm", "attention.qkv"),
        values("attention.query_key_value", "attention.dense", ("2head_dim", "head_dim", "3head_dim")),
        norm("post_attention_layernorm", "mlp.dense_h_to_4h"),
    ),
    residual=Residual(final="final_layer_norm", centred=True),
)
MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    base_class="MixtralModel",
    rows=_attention() + _experts("block_sparse_moe", "w1", "w3", "w2"),
    vectors=_TWO_NORMS,
    renames=((".block_sparse_moe.", ".mlp."),),
    sources=(
        *OF_ATTENTION,
        Source(name="block_sparse_moe.experts.{e}.w3", reads="block_sparse_moe.experts.{e}.w2"),
    ),
    residual=PRE_NORM,
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    base_class="Qwen3MoeModel",
    rows=_attention(bias=_AS_ATTENTION_SAYS)
    + _gated_mlp("dense")
    + _experts("mlp", "gate_proj", "up_proj", "down_proj"),
    vectors=_TWO_NORMS + _QK_NORMS,
    default_head_dim=128,
    sources=(
        *OF_ATTENTION,
        *OF_GATED_MLP,  # of the dense blocks: those of a mixture read their norm under other keys
        Source(name="mlp.experts.{e}.up_proj", reads="mlp.experts.{e}.down_proj"),
    ),
    residual=PRE_NORM,
)
BERT = Family(
    name="bert",
    model_types=("bert",),
    base_class="BertModel",
    prefix="bert.",
    blocks="encoder.layer",
    rows=(
        Row(
            name="attention.self.query",
            role="query",
            reads="attention.self.qkv",
            shape=("q", "hidden"),
            bias=_ALWAYS,
        ),
        Row(name="attention.self.key", role="key", reads="attention.self.qkv", shape=("kv", "hidden"), bias=_ALWAYS),
        Row(
            name="attention.self.value",
            role="value",
            reads="attention.self.qkv",
            shape=("kv", "hidden"),
            bias=_ALWAYS,
        ),
        Row(
            name="attention.output.dense",
            role="output",
            reads="attention.output.dense",
            shape=("hidden", "q"),
            bias=_ALWAYS,
        ),
        Row(name="intermediate.dense", role="up", reads="intermediate.dense", shape=("mlp", "hidden"), bias=_ALWAYS),
        Row(name="output.dense", role="down", reads="output.dense", shape=("hidden", "mlp"), bias=_ALWAYS),
    ),
    vectors=(),
    embedding="embeddings.word_embeddings",
    outside=(("embeddings.position_embeddings.weight", "*,hidden"),),
    head=None,
    beside_prefix=("cls.", "classifier.", "qa_outputs."),
    renames=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    causal=False,
    tied_by_default=True,
    sources=(values("attention.self.value", "attention.output.dense"),),
    residual=Residual(refused="its norms stand in the residual stream itself and multiply it channel by channel"),
)

FAMILIES: tuple[Family, ...] = (
    LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GPT2, GPT_NEO, GPT_NEOX, MIXTRAL, QWEN3_MOE, BERT,
)  # fmt: skip


def find_family(model_type: str) -> Family:
    """The family of a config's `model_type`; raises `UnknownFamilyError` that names the next step."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = [name for family in FAMILIES for name in family.model_types]
    raise UnknownFamilyError(
        f"{unknown_word('model_type', model_type, known)}. What is missing is its table of blocks and matrices in "
        "fettle/models/families.py. Use --generic (generic=True) to treat every matrix under its numbered blocks alike."
    )


#: families whose configuration says the size of a head apart from the width, so that heads can go and the width stays
FREE_HEAD_SIZE = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "mixtral", "qwen3_moe"})
#: of these, the ones with root-mean-square norms alone and embeddings as they are: their width can shrink exactly
FREE_WIDTH = FREE_HEAD_SIZE - {"gemma2"}
