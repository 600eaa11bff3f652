"""Training methods: distillation and healing, quantization-aware training, adapters. One import line registers one."""

from __future__ import annotations

from fettle.methods.train.adapters import Adapter as Adapter
from fettle.methods.train.distill import Distill as Distill
from fettle.methods.train.qat import Qat as Qat
