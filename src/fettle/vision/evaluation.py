"""What an image classifier is worth and what it costs, measured on the written files, beside its original.

Both networks answer the same images: accuracy where there are labels, agreement of the first choice, and the divergence
KL(original ‖ model) of their probabilities. Parameters and bytes are counted in the files; multiply-adds are counted by
torch while one image passes (products of convolutions and linear layers; additions, norms and activations are not
counted). Latency is the median of single images, the two networks taking turns so that whatever else the machine does
meets both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fettle.evaluate.memory import peak_memory_bytes
from fettle.methods.filters.dependencies import logits_of
from fettle.methods.filters.healing import logits_for
from fettle.vision.classifier import ImageClassifier
from fettle.vision.images import ImageSet
from fettle.vision.widths import filters, widths_of

TIMED_RUNS = 15
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one network costs.

    Attributes:
        parameters: numbers that were learned; running means and variances are none.
        filters: of all convolutions.
        multiply_adds: for one image of the size that it was made for.
        bytes: length of the weights' files.
    """

    parameters: int
    filters: int
    multiply_adds: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ClassifierEvaluation:
    """Everything measured on the files of one classifier; what needs labels or an original is None without."""

    accuracy: float | None = None
    reference_accuracy: float | None = None
    top1_agreement: float | None = None
    kl_mean: float | None = None  # nats an image
    kl_p99: float | None = None
    cost: Cost
    reference_cost: Cost | None = None
    latency_ms: float
    reference_latency_ms: float | None = None
    images: int
    images_source: str
    images_sha256: str
    model_hashes: dict[str, str] = field(default_factory=dict)
    reference_hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        return {"schema": SCHEMA, "kind": "image_classifier", **dataclasses.asdict(self)}


def measure_cost(classifier: ImageClassifier) -> Cost:
    """Counts parameters, filters, multiply-adds and bytes."""
    network, checkpoint = classifier.model, classifier.checkpoint
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        filters=filters(widths_of(network)),
        multiply_adds=multiply_adds(network, classifier.preprocessing.example()),
        bytes=sum((checkpoint.folder / shard).stat().st_size for shard in checkpoint.shards),
    )


def multiply_adds(network: nn.Module, example: Tensor) -> int:
    """Products summed in convolutions and linear layers for `example`, [images, channels, height, width]."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        logits_of(network, example.to(device))
    return int(counted.get_total_flops()) // 2


def evaluate_classifier(
    classifier: ImageClassifier, reference: ImageClassifier | None, images: ImageSet, *, device: str = "cpu"
) -> ClassifierEvaluation:
    """Measures a classifier on images, against the original where one is given; both are on `device`."""
    started = time.monotonic()
    data = images.on(device).data
    logits = logits_for(classifier.model, data)
    other = None if reference is None else logits_for(reference.model, data)
    divergence = None if other is None else _divergence(other, logits)
    networks = [one.model for one in (classifier, reference) if one is not None]
    times = latencies_ms(networks, classifier.preprocessing.example().to(device))
    return ClassifierEvaluation(
        accuracy=_accuracy(logits, data.labels),
        reference_accuracy=None if other is None else _accuracy(other, data.labels),
        top1_agreement=None if other is None else _share(logits.argmax(-1) == other.argmax(-1)),
        kl_mean=None if divergence is None else float(divergence.mean()),
        kl_p99=None if divergence is None else float(divergence.quantile(0.99)),
        cost=measure_cost(classifier),
        reference_cost=None if reference is None else measure_cost(reference),
        latency_ms=times[0],
        reference_latency_ms=times[1] if len(times) > 1 else None,
        images=len(data.images),
        images_source=images.source,
        images_sha256=images.sha256,
        model_hashes=classifier.checkpoint.file_hashes(),
        reference_hashes={} if reference is None else reference.checkpoint.file_hashes(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=peak_memory_bytes(),
    )


@torch.no_grad()
def latencies_ms(networks: list[nn.Module], example: Tensor, runs: int = TIMED_RUNS) -> list[float]:
    """The median time of one image in each network, in milliseconds; the networks take turns."""
    spent: list[list[float]] = [[] for _ in networks]
    for turn in range(runs + 2):
        for network, times in zip(networks, spent, strict=True):
            started = time.perf_counter()
            logits_of(network, example)
            if example.is_cuda:
                torch.cuda.synchronize()
            if turn >= 2:  # the first two warm the caches
                times.append(1000 * (time.perf_counter() - started))
    return [round(statistics.median(times), 4) for times in spent]


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """float64 [images]: KL(reference ‖ model), in nats."""
    target = functional.log_softmax(reference.double(), dim=-1)
    found = functional.log_softmax(logits.double(), dim=-1)
    return functional.kl_div(found, target, log_target=True, reduction="none").sum(-1).clamp_min(0)


def _accuracy(logits: Tensor, labels: Tensor | None) -> float | None:
    return None if labels is None else _share(logits.argmax(-1) == labels)


def _share(same: Tensor) -> float:
    return float(same.double().mean())
