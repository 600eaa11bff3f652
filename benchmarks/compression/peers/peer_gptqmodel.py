"""GPTQModel's GPTQ on a local folder, 4 bits with groups of 128; runs in GPTQModel's own environment.

In float32: products in bfloat16 are forty times slower on a CPU without instructions for them.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default fails on two cores: its loader wants two

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer


def main() -> None:
    model_path, output, windows, length, text_path = sys.argv[1:6]
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with open(text_path, encoding="utf-8") as file:
        ids = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    count, size = int(windows), int(length)
    rows = [ids[(i * size) % max(1, len(ids) - size) :][:size] for i in range(count)]
    data = [{"input_ids": row, "attention_mask": [1] * size} for row in rows]
    model = GPTQModel.load(model_path, QuantizeConfig(bits=4, group_size=128), device="cpu", dtype=torch.float32)
    model.quantize(data, batch_size=1)
    model.save(output)


if __name__ == "__main__":
    main()
