"""llm-compressor's GPTQ or AWQ; runs in llm-compressor's own environment.

The model is compressed in float32 and its scales are rounded to float16, the type that they are counted as: its files
hold scales in the model's type.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from exchange import Job, Outcome, read_tensors, run, uniform_bits
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM


def modifiers(job: Job) -> list[Any]:
    """What does the job: GPTQ, or AWQ's scales and rounding after them."""
    arguments = QuantizationArgs(
        num_bits=job.bits, type="int", strategy="group", group_size=job.group_size, symmetric=False
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    settings: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if not job.options.get("awq"):
        return [GPTQModifier(**settings)]
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # 0.14 pins memory all the same, which torch refuses
        IntermediatesCache.pin_memory = lambda self, index: None
    return [AWQModifier(duo_scaling="both"), QuantizationModifier(**settings)]


def compress(job: Job) -> Outcome:
    """Runs the modifiers over the windows; AWQ changes norms too, so every parameter is handed back."""
    windows = job.windows()
    rows = {"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]}
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    oneshot(
        model=model, dataset=Dataset.from_dict(rows), recipe=modifiers(job), max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows), shuffle_calibration_samples=False,
    )  # fmt: skip
    names = set(read_tensors(job.original))
    weights = {name: value.detach() for name, value in model.named_parameters() if name in names}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            scale = module.weight_scale.detach().half().float()
            zero = module.weight_zero_point.detach().float()
            weights[f"{name}.weight"] = fake_quantize(module.weight.detach(), scale, zero, scheme.weights)
    name = "AWQ" if job.options.get("awq") else "GPTQ"
    bits = uniform_bits(job, scale_bits=16, zero_bits=job.bits)
    return Outcome(weights, bits, f"{name}, int{job.bits}, group {job.group_size}, asymmetric")


if __name__ == "__main__":
    run(compress, version("llmcompressor"))
