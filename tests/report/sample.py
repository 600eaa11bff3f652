"""A result document like those that `compress` writes: eight blocks, seven roles, believable numbers.

Made by a formula, so that a page full of it is the same on every machine; the tests and the eye look at the same page.
"""

from __future__ import annotations

import math
from typing import Any

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
PLACES = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "gate": "mlp.gate_proj",
          "output": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
RECIPE = """name: gptq-4bit
calibration: {windows: 128, length: 512, seed: 0}
steps:
  - method: gptq
    bits: 4
    group_size: 32
    symmetric: false
    where: {role: [query, key, value, output, gate, up, down]}
"""
CONTEXTS = (
    ("        if not isinstance(value, ", "str", "):\n            raise TypeError", " int", " str"),
    ("    def __init__(self, *, name", "=", "None, mode='r'):\n", ",", "="),
    ("    return [line.rstrip('\\n') for line in ", "handle", "]\n\n\ndef main", " f", " lines"),
    ("class Parser:\n    \"\"\"Read a stream.\"\"\"\n", "\n", "    def feed(self, data):\n        self.", "    ", "\n"),
    ("        self._lock = threading.", "R", "Lock()\n        self._queue = deque", "Event", "Lock"),
    ("    # the caller holds the lock, so that\n", "    ", "# nothing else can write here\n", "    ", "        "),
)  # fmt: skip


def compression(blocks: int = 8, model: str = "demo", recipe: str = "gptq-4bit", loss: float = 1.0) -> dict[str, Any]:
    """The summary of a compression, whole; `loss` makes another result out of it, that much worse."""
    return {
        "schema": 1, "kind": "compression", "model": model,
        "base": {"name": model, "bytes": 10_367_384,
                 "hashes": {"config.json": "3f" * 32, "model.safetensors": "a7" * 32}},
        "output": {"folder": f"{model}-small", "bytes": 4_511_176,
                   "hashes": {f"model-{n:05d}.safetensors": f"{n:02x}" * 32 for n in range(1, 4)}},
        "recipe": {"name": recipe}, "recipe_yaml": RECIPE,
        "command": f"fettle compress {model} -o {model}-small --recipe {recipe}",
        "calibration": {"source": "embedded calibration text", "sha256": "5c" * 32, "windows": 128, "length": 512,
                        "seed": 0, "note": ""},
        "ledger": ledger(blocks), "seconds": 43.7, "peak_memory_bytes": 512_344_064,
        "versions": {"fettle": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "evaluation": evaluation(blocks, loss), "completions": completions(),
    }  # fmt: skip


def evaluation(blocks: int = 8, loss: float = 1.0) -> dict[str, Any]:
    """What `Evaluation.to_json` gives for a language model with a reference."""
    return {
        "schema": 1, "perplexity": 23.4231, "perplexity_standard_error": 0.502, "reference_perplexity": 23.2702,
        "reference_perplexity_standard_error": 0.499, "bits_per_byte": 1.4213, "reference_bits_per_byte": 1.4166,
        "kl_mean": 0.01468 * loss, "kl_median": 0.01027 * loss, "kl_p99": 0.0851 * loss, "kl_max": 0.4812 * loss,
        "top1_agreement": 1 - 0.0841 * loss,
        "probability_rms_change": 0.0255, "output_relative_error": 0.0974, "output_cosine": 0.99413,
        "bits_per_weight": 4.626, "model_bits_per_weight": 6.962, "reference_model_bits_per_weight": 16.0,
        "bytes": 4_511_176, "reference_bytes": 10_367_384, "parameters": 5_183_744, "tokens": 16_384,
        "text_source": "embedded heldout text", "text_sha256": "9d" * 32, "text_note": "", "window_tokens": 512,
        "model_hashes": {"model-00001.safetensors": "01" * 32}, "reference_hashes": {"model.safetensors": "a7" * 32},
        "versions": {"fettle": "0.1.0", "torch": "2.13.0"}, "worst_tokens": worst_tokens(),
        "kl_histogram": kl_histogram(16_384),
        "error_by_block": [0.11 * loss * (1 - 0.65 * math.exp(-0.15 * index)) for index in range(blocks)],
        "seconds": 12.6, "peak_memory_bytes": 655_360_000,
    }  # fmt: skip


def ledger(blocks: int) -> list[dict[str, Any]]:
    """One line a linear; the down projections lose most, as they do."""
    weights = {"query": 3.1, "key": 2.4, "value": 4.4, "output": 6.2, "gate": 3.6, "up": 4.1, "down": 8.3}
    return [
        {"linear": f"model.layers.{block}.{PLACES[role]}", "block": block, "role": role, "method": "gptq",
         "scheme": "int4, group 32, zero point, bfloat16 scale", "error": 1e-3 * weights[role] * (1 + 0.12 * block),
         "objective": "output_error", "bits_per_weight": 4.626, "seconds": 0.21 + 0.03 * len(role),
         "note": "3 dead columns" if role == "down" and block == 0 else ""}
        for block in range(blocks) for role in ROLES
    ]  # fmt: skip


def kl_histogram(tokens: int) -> dict[str, list[float]]:
    """A bell over logarithmic edges, as KL spreads."""
    edges = [0.0] + [10.0 ** (exponent / 4) for exponent in range(-24, 9)]
    bell = [0.0] + [math.exp(-(((exponent / 4 + 2.0) / 0.62) ** 2) / 2) for exponent in range(-24, 8)]
    return {"edges": edges, "counts": [float(round(tokens * share / sum(bell))) for share in bell]}


def worst_tokens() -> list[dict[str, Any]]:
    """Twenty tokens in their contexts, the worst first."""
    found = []
    for index in range(20):
        context, token, following, predicted, reference = CONTEXTS[index % len(CONTEXTS)]
        found.append(
            {"kl": 0.4812 * 0.93**index, "context": "import os\n\n\n" + context, "token": token, "following": following,
             "predicted": predicted, "reference_predicted": reference, "probability": 0.05 + 0.01 * index,
             "reference_probability": 0.41 - 0.01 * index}
        )  # fmt: skip
    return found


def completions() -> list[dict[str, str]]:
    """The same prompt, twice."""
    prompt = 'def read_lines(path):\n    """Return the lines of a text file."""\n'
    body = "    with open(path, 'r', encoding='utf-8') as f:\n        return f.readlines()\n"
    return [{"prompt": prompt, "original": body, "compressed": body.replace("f.readlines()", "[line for line in f]")}]


def hostile(text: str) -> dict[str, Any]:
    """A small document in which `text` stands wherever a text or a name can."""
    document = compression(blocks=2, model=text, recipe=text)
    for line in document["ledger"]:
        line |= {"linear": text, "role": text, "method": text, "scheme": text, "note": text}
    token = {key: text for key in ("context", "token", "following", "predicted", "reference_predicted")}
    document["evaluation"] |= {
        "worst_tokens": [{"kl": 0.4, "probability": 0.1, "reference_probability": 0.2, **token}],
        "text_source": text, "text_note": text,
    }  # fmt: skip
    return document | {
        "recipe_yaml": text, "command": text, "versions": {text: text}, "completions": [
            {"prompt": text, "original": text, "compressed": text}
        ],
        "calibration": {"source": text, "sha256": text, "windows": 1, "length": 2, "seed": 0, "note": text},
        "base": {"name": text, "bytes": 2, "hashes": {text: text}},
        "output": {"folder": text, "bytes": 1, "hashes": {text: text}},
    }  # fmt: skip
