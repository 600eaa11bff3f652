"""AutoRound with 200 steps, written in the GPTQ format and read back; runs in AutoRound's own environment."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from exchange import Job, Outcome, gptq_weights, run, stored_bits, uniform_bits
from transformers import AutoModelForCausalLM, AutoTokenizer


def compress(job: Job) -> Outcome:
    """Tunes roundings and ranges, a block at a time; `symmetric` is an option of the job."""
    symmetric = bool(job.options.get("symmetric", False))
    windows = job.windows()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    data = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        for row in windows
    ]
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(job.model), bits=job.bits, group_size=job.group_size, sym=symmetric,
        iters=200, nsamples=len(windows), seqlen=len(windows[0]), batch_size=8, dataset=data, device_map="cpu",
        seed=0, enable_torch_compile=False, amp=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rounding.quantize_and_save(folder, format="auto_gptq")
        written = next(path.parent for path in sorted(Path(folder).rglob("*.safetensors")))
        weights, differ, index_bits = gptq_weights(written, job, zero_offset=1)
        stored = stored_bits(job, written)
    bits = uniform_bits(job, scale_bits=16, zero_bits=job.bits if differ else 0) + index_bits
    kind = "symmetric" if symmetric else "asymmetric"
    return Outcome(weights, bits, f"int{job.bits}, group {job.group_size}, {kind}, 200 steps", stored)


if __name__ == "__main__":
    run(compress, version("auto-round"))
