"""ONNX Runtime GenAI on the processor with int4 weights of random numbers, its graph written here without a builder.

    python ort.py int4-32 --blocks 22 --threads 2 --folder DIR

The graph has the operations that its model builder writes for this family (`-p int4 -e cpu`): `MatMulNBits` with inputs
as bytes (accuracy level 4), `GroupQueryAttention` with rotary positions and a shared buffer of keys and values,
`SkipSimplifiedLayerNormalization`; the head's codes are of the same kind, and only the last token meets it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as genai
from onnx import TensorProto, helper, numpy_helper
from turns import (
    DECODED,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLP,
    PROMPT,
    TOGETHER,
    VOCABULARY,
    peer_options,
    take_turns,
)

FORMATS = {"int4-32": 32, "int4-128": 128}
CONTEXT = 1024
MICROSOFT = "com.microsoft"


class Graph:
    """Nodes and constants of a model under way."""

    def __init__(self, group: int) -> None:
        self.group, self.random = group, np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def add(self, kind: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, list(outputs), name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def linear(self, name: str, x: str, rows: int, columns: int) -> str:
        groups = columns // self.group
        codes = self.random.integers(0, 256, (rows, groups, self.group // 2), np.uint8)
        parts = [
            self.constant(f"{name}.codes", codes),
            self.constant(f"{name}.scales", np.full(rows * groups, 0.004, np.float32)),
        ]
        return self.add(
            "MatMulNBits", [x, *parts], name, domain=MICROSOFT,
            K=columns, N=rows, bits=4, block_size=self.group, accuracy_level=4,
        )  # fmt: skip


def write(folder: Path, count: int, group: int, threads: int) -> None:
    graph = Graph(group)
    angle = np.arange(CONTEXT)[:, None] * 10000.0 ** (-np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    for name, table in (("cosine", np.cos(angle)), ("sine", np.sin(angle))):
        graph.constant(name, table.astype(np.float32))
    graph.constant("ones", np.ones(HIDDEN, np.float32))
    for name, number in (("one", [1]), ("last", [-1])):
        graph.constant(name, np.array(number, np.int64))
    embedding = graph.random.standard_normal((VOCABULARY, HIDDEN), np.float32)
    residual = graph.add("Gather", [graph.constant("embedding", embedding), "input_ids"], "embedded")
    seen = graph.add("ReduceSum", ["attention_mask", "one"], "seen", keepdims=0)
    graph.add("Cast", [graph.add("Sub", [seen, "one"], "behind")], "lengths", to=TensorProto.INT32)
    whole = graph.add("Gather", [graph.add("Shape", ["attention_mask"], "shape"), "one"], "whole")
    graph.add("Cast", [graph.add("Squeeze", [whole], "scalar")], "total", to=TensorProto.INT32)
    normed = graph.add("SimplifiedLayerNormalization", [residual, "ones"], "normed", axis=-1, epsilon=1e-5)

    def norm(i: str, update: str) -> tuple[str, str]:
        """(normed, residual + update)."""
        outputs = (f"normed.{i}", "", "", f"residual.{i}")
        graph.add(
            "SkipSimplifiedLayerNormalization", [residual, update, "ones"], *outputs, domain=MICROSOFT, epsilon=1e-5
        )
        return outputs[0], outputs[3]

    narrow = KV_HEADS * HEAD_SIZE
    for i in range(count):
        parts = [graph.linear(f"q.{i}", normed, HIDDEN, HIDDEN)]
        parts += [graph.linear(f"{name}.{i}", normed, narrow, HIDDEN) for name in "kv"]
        past = [f"past_key_values.{i}.{name}" for name in ("key", "value")]
        mixed = graph.add(
            "GroupQueryAttention", [*parts, *past, "lengths", "total", "cosine", "sine"], f"mixed.{i}",
            f"present.{i}.key", f"present.{i}.value", domain=MICROSOFT,
            num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1, rotary_interleaved=0, scale=HEAD_SIZE**-0.5,
        )  # fmt: skip
        normed, residual = norm(f"{i}.mlp", graph.linear(f"o.{i}", mixed, HIDDEN, HIDDEN))
        gate, up = (graph.linear(f"{name}.{i}", normed, MLP, HIDDEN) for name in ("gate", "up"))
        active = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], f"sigmoid.{i}")], f"active.{i}")
        update = graph.linear(f"down.{i}", graph.add("Mul", [active, up], f"gated.{i}"), HIDDEN, MLP)
        normed, residual = norm(f"{i}", update)
    graph.linear("logits", graph.add("Gather", [normed, "last"], "newest", axis=1), VOCABULARY, HIDDEN)

    def value(name: str, kind: int, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    pasts = [f"{i}.{name}" for i in range(count) for name in ("key", "value")]
    inputs = [value("input_ids", TensorProto.INT64, "b", "s"), value("attention_mask", TensorProto.INT64, "b", "t")]
    inputs += [value(f"past_key_values.{p}", TensorProto.FLOAT, "b", KV_HEADS, "p", HEAD_SIZE) for p in pasts]
    outputs = [value("logits", TensorProto.FLOAT, "b", 1, VOCABULARY)]
    outputs += [value(f"present.{p}", TensorProto.FLOAT, "b", KV_HEADS, "t", HEAD_SIZE) for p in pasts]
    made = helper.make_model(
        helper.make_graph(graph.nodes, "llama", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)], ir_version=10,
    )  # fmt: skip
    onnx.save(made, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    write_config(folder, count, threads)


def write_config(folder: Path, count: int, threads: int) -> None:
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    decoder = {
        "filename": "model.onnx", "head_size": HEAD_SIZE, "hidden_size": HIDDEN, "num_attention_heads": HEADS,
        "num_hidden_layers": count, "num_key_value_heads": KV_HEADS,
        "session_options": {"intra_op_num_threads": threads, "provider_options": []},
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
        },
    }  # fmt: skip
    model = {
        "type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "context_length": CONTEXT,
        "vocab_size": VOCABULARY, "decoder": decoder,
    }  # fmt: skip
    search = {"max_length": CONTEXT, "past_present_share_buffer": True, "do_sample": False}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": search}))


def main() -> None:
    options = peer_options(__doc__, FORMATS)
    folder = options.folder / f"ort-{options.format}-{options.blocks}-{options.threads}"
    if not (folder / "genai_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, options.blocks, FORMATS[options.format], options.threads)
    model = genai.Model(str(folder))

    def prefilled(sequences: int) -> Any:
        wanted = genai.GeneratorParams(model)
        length = PROMPT + DECODED + 8
        wanted.set_search_options(max_length=length, min_length=length, batch_size=sequences, do_sample=False)
        generator = genai.Generator(model, wanted)
        generator.append_tokens(np.full((sequences, PROMPT), 7, np.int32))
        return generator

    def decode(sequences: int) -> float:
        """Seconds, without those of the prompt; the first token needs no step of the model, so it is not counted."""
        generator = prefilled(sequences)
        generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(DECODED):
            generator.generate_next_token()
        return time.perf_counter() - began

    def prefill() -> None:
        prefilled(1)

    prefill()
    take_turns(
        {"prefill": prefill, "decode": lambda: decode(1), "decode8": lambda: decode(TOGETHER)},
        {"engine": f"ONNX Runtime GenAI {genai.__version__}", "bytes": (folder / "model.onnx.data").stat().st_size},
    )


if __name__ == "__main__":
    main()
