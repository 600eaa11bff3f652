"""llm-compressor's GPTQ on a local folder, W4A16 with groups of 128; runs in llm-compressor's own environment.

In float32: products in bfloat16 are forty times slower on a CPU without instructions for them.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_path, output, windows, length, text_path = sys.argv[1:6]
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with open(text_path, encoding="utf-8") as file:
        ids = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    count, size = int(windows), int(length)
    rows = [ids[(i * size) % max(1, len(ids) - size) :][:size] for i in range(count)]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * size] * count})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    oneshot(
        model=model,
        dataset=dataset,
        recipe=[GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])],
        max_seq_length=size,
        num_calibration_samples=count,
    )
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
