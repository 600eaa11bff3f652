"""What half of the filters saves at full size: multiply-adds predicted, time measured, on images of 224 × 224.

    python benchmarks/vision/latency.py --network resnet-50

Random weights: time does not depend on them. The networks take turns, one image at a time on one thread; one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import nn

from fettle.methods.filters.prune_filters import PruneFilters
from fettle.vision.evaluation import latencies_ms, multiply_adds
from fettle.vision.vgg import Vgg


def built(network: str) -> nn.Module:
    """The network at its published size."""
    if network == "vgg-16":
        return Vgg("vgg16", num_classes=1000)
    import transformers

    configs = {
        "resnet-50": transformers.ResNetConfig(num_labels=1000),
        "mobilenet-v1": transformers.MobileNetV1Config(num_labels=1001),
        "mobilenet-v2": transformers.MobileNetV2Config(num_labels=1001),
    }
    return transformers.AutoModelForImageClassification.from_config(configs[network])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet-50")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    original = built(arguments.network).eval()
    pruned, example = copy.deepcopy(original), torch.randn(1, 3, 224, 224)
    PruneFilters(sparsity=arguments.sparsity).prune_network(pruned, example)
    before, after = latencies_ms([original, pruned], example, arguments.runs)
    products = [multiply_adds(network, example) for network in (original, pruned)]
    line = {
        "network": arguments.network, "sparsity": arguments.sparsity,
        "parameters": [sum(p.numel() for p in network.parameters()) for network in (original, pruned)],
        "multiply_adds": products, "latency_ms": [before, after], "ratio_predicted": products[1] / products[0],
        "ratio_measured": after / before,
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
