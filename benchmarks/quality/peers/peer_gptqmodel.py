"""GPTQModel's GPTQ, written in the GPTQ format and read back; runs in GPTQModel's own environment."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from exchange import Job, Outcome, gptq_weights, run, stored_bits, uniform_bits

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7.0 starts two loaders, and on two cores allows itself one


def compress(job: Job) -> Outcome:
    """Asymmetric groups; the job's options are fields of its configuration, such as desc_act."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=job.bits, group_size=job.group_size, sym=False, **job.options)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.windows()]
    model = GPTQModel.load(str(job.model), config, device="cpu", dtype=torch.float32)
    model.quantize(data, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        written = Path(folder)
        told = json.loads((written / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        offset = 0 if told.get("checkpoint_format", told.get("format")) == "gptq_v2" else 1
        weights, _, index_bits = gptq_weights(written, job, zero_offset=offset)
        stored = stored_bits(job, written)
    bits = uniform_bits(job, scale_bits=16, zero_bits=job.bits) + index_bits
    options = "".join(f", {key} {value}" for key, value in job.options.items())
    return Outcome(weights, bits, f"int{job.bits}, group {job.group_size}, asymmetric{options}", stored)


if __name__ == "__main__":
    run(compress, version("gptqmodel"))
