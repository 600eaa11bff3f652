"""OpenVINO on the processor with int4 weights of random numbers, its graph written here without a converter.

    python ov.py int4-128 --blocks 22 --threads 2 --folder DIR

The graph has the patterns that the plugin knows by heart: weights are u4 codes, a zero point and a float16 scale for
each group, converted, shifted and scaled in front of a product (a compressed one, when it is compiled); past keys and
values are states that are gathered by `beam_idx` and grow; attention is one operation. The head has 8-bit codes a row,
as the converters of its makers have it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
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

KEPT: list[np.ndarray] = []  # constants of four bits share the memory of an array and do not hold it
FORMATS = {"int4-128": 128, "int4-32": 32}


def codes(rows: int, columns: int, group: int, random: np.random.Generator, kind: Any) -> Any:
    """A compressed weight as float32 [rows, columns]: (code - zero point) · scale."""
    together = 2 if kind == ov.Type.u4 else 1  # codes of a byte
    packed = random.integers(0, 256, rows * columns // together, np.uint8)
    shape = [rows, columns // group, group]
    zeros = np.full(rows * (columns // group) // together, 0x88 if together == 2 else 128, np.uint8)
    weight = op.constant(ov.Tensor(packed, ov.Shape(shape), kind))
    zero = op.constant(ov.Tensor(zeros, ov.Shape([*shape[:2], 1]), kind))
    KEPT.extend((packed, zeros))
    scale = op.constant(np.full((*shape[:2], 1), 0.004, np.float16))
    shifted = op.subtract(op.convert(weight, ov.Type.f16), op.convert(zero, ov.Type.f16))
    flat = op.reshape(op.multiply(shifted, scale), op.constant(np.array([rows, columns])), special_zero=False)
    return op.convert(flat, ov.Type.f32)


def whole(*values: int) -> Any:
    return op.constant(np.array(values, np.int64))


def rms_norm(x: Any) -> Any:
    mean = op.reduce_mean(op.power(x, op.constant(np.float32(2))), whole(-1), keep_dims=True)
    inverse = op.divide(op.constant(np.float32(1)), op.sqrt(op.add(mean, op.constant(np.float32(1e-5)))))
    return op.multiply(op.multiply(x, inverse), op.constant(np.ones((1, 1, HIDDEN), np.float32)))


def heads(x: Any, count: int) -> Any:
    return op.transpose(op.reshape(x, whole(0, 0, count, HEAD_SIZE), special_zero=True), whole(0, 2, 1, 3))


def turned(x: Any, cosine: Any, sine: Any) -> Any:
    first, second = op.split(x, op.constant(np.int64(-1)), 2).outputs()
    half = op.concat([op.multiply(second, op.constant(np.float32(-1))), first], -1)
    return op.add(op.multiply(x, cosine), op.multiply(half, sine))


def write(path: Path, count: int, group: int) -> None:
    random = np.random.default_rng(0)
    ids, position, beam = (
        op.parameter(shape, np.int64 if name != "beam_idx" else np.int32, name)
        for name, shape in (("input_ids", [-1, -1]), ("position_ids", [-1, -1]), ("beam_idx", [-1]))
    )
    for parameter, name in ((ids, "input_ids"), (position, "position_ids"), (beam, "beam_idx")):
        parameter.output(0).set_names({name})

    def linear(x: Any, rows: int, columns: int) -> Any:
        return op.matmul(x, codes(rows, columns, group, random, ov.Type.u4), False, True)

    frequencies = 10000.0 ** (-np.arange(0, HEAD_SIZE, 2, dtype=np.float32) / HEAD_SIZE)
    angle = op.multiply(
        op.unsqueeze(op.convert(position, ov.Type.f32), whole(1, 3)),  # [sequences, 1, tokens, 1]
        op.constant(np.concatenate([frequencies, frequencies]).reshape(1, 1, 1, HEAD_SIZE)),
    )
    cosine, sine = op.cos(angle), op.sin(angle)
    table = op.constant(random.standard_normal((VOCABULARY, HIDDEN), np.float32).astype(np.float16))
    hidden = op.convert(op.gather(table, ids, op.constant(np.int64(0))), ov.Type.f32)
    batch = op.gather(op.shape_of(ids), whole(0), op.constant(np.int64(0)))
    sinks, mask = [], None
    for i in range(count):
        normed = rms_norm(hidden)
        query = turned(heads(linear(normed, HIDDEN, HIDDEN), HEADS), cosine, sine)
        key = turned(heads(linear(normed, KV_HEADS * HEAD_SIZE, HIDDEN), KV_HEADS), cosine, sine)
        value = heads(linear(normed, KV_HEADS * HEAD_SIZE, HIDDEN), KV_HEADS)
        known = []
        for name, new in (("key", key), ("value", value)):
            told = VariableInfo()
            told.data_shape, told.data_type = ov.PartialShape([-1, KV_HEADS, -1, HEAD_SIZE]), ov.Type.f32
            told.variable_id = f"{name}.{i}"
            variable = Variable(told)
            empty = op.broadcast(
                op.constant(np.float32(0)), op.concat([batch, whole(KV_HEADS), whole(0), whole(HEAD_SIZE)], 0)
            )
            past = op.gather(op.read_value(empty, variable), beam, op.constant(np.int64(0)))
            grown = op.concat([past, new], 2)
            sinks.append(op.assign(grown, variable))
            known.append(grown)
        if mask is None:  # a token sees what is not behind it
            length = op.gather(op.shape_of(known[0]), whole(2), op.constant(np.int64(0)))
            place = op.range(op.constant(np.int64(0)), op.squeeze(length, whole(0)), op.constant(np.int64(1)), "i64")
            seen = op.less_equal(op.unsqueeze(place, whole(0, 1, 2)), op.unsqueeze(position, whole(1, 3)))
            mask = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(-1e9)))
        wide = []
        for grown in known:
            ones = op.constant(np.ones((1, 1, HEADS // KV_HEADS, 1, 1), np.float32))
            many = op.multiply(
                op.unsqueeze(grown, op.constant(np.int64(2))), ones
            )  # only this form is one with attention
            wide.append(op.reshape(many, whole(0, HEADS, -1, HEAD_SIZE), special_zero=True))
        mixed = op.scaled_dot_product_attention(query, *wide, mask, causal=False)
        flat = op.reshape(op.transpose(mixed, whole(0, 2, 1, 3)), whole(0, 0, HIDDEN), special_zero=True)
        hidden = op.add(hidden, linear(flat, HIDDEN, HIDDEN))
        normed = rms_norm(hidden)
        gate, up = linear(normed, MLP, HIDDEN), linear(normed, MLP, HIDDEN)
        hidden = op.add(hidden, linear(op.multiply(op.swish(gate), up), HIDDEN, MLP))
    last = op.gather(rms_norm(hidden), whole(-1), op.constant(np.int64(1)))
    logits = op.matmul(last, codes(VOCABULARY, HIDDEN, HIDDEN, random, ov.Type.u8), False, True)
    result = op.result(logits)
    result.output(0).set_names({"logits"})
    ov.save_model(ov.Model([result], sinks, [ids, position, beam]), str(path), compress_to_fp16=False)


def main() -> None:
    options = peer_options(__doc__, FORMATS)
    path = options.folder / f"openvino-{options.format}-{options.blocks}.xml"
    if not path.exists():
        write(path, options.blocks, FORMATS[options.format])
    compiled = ov.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    )
    request = compiled.create_infer_request()

    def run(sequences: int, before: int, tokens: int, parents: int) -> None:
        places = np.tile(np.arange(before, before + tokens), (sequences, 1))
        beam = np.arange(sequences, dtype=np.int32) % parents
        request.infer({"input_ids": np.full((sequences, tokens), 7), "position_ids": places, "beam_idx": beam})
        assert np.isfinite(request.get_tensor("logits").data).all()

    def prefill() -> None:
        request.reset_state()
        run(1, 0, PROMPT, 1)

    def decode(sequences: int) -> float:
        """Seconds, without those of the prompt, and of the step that gives all sequences the same past."""
        prefill()
        run(sequences, PROMPT, 1, 1)
        began = time.perf_counter()
        for i in range(DECODED):
            run(sequences, PROMPT + 1 + i, 1, sequences)
        return time.perf_counter() - began

    prefill()
    take_turns(
        {"prefill": prefill, "decode": lambda: decode(1), "decode8": lambda: decode(TOGETHER)},
        {"engine": f"OpenVINO {ov.__version__.partition('-')[0]}", "bytes": path.with_suffix(".bin").stat().st_size},
    )


if __name__ == "__main__":
    main()
