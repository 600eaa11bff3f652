"""Training methods: distillation and healing, quantization- and sparsity-aware training, adapters. One import line
registers one.
"""

from __future__ import annotations

from fettle.methods.train.adapters import Adapter as Adapter
from fettle.methods.train.distill import Distill as Distill
from fettle.methods.train.job import TrainMethod as TrainMethod
from fettle.methods.train.qat import Qat as Qat
from fettle.methods.train.sparse import Sparse as Sparse

TRAIN_METHODS: dict[str, type[TrainMethod]] = {cls.name: cls for cls in (Distill, Qat, Sparse, Adapter)}
