"""A configuration in the family's own words for a pruned network, where it has them.

transformers' families are told a few numbers, and every other width follows from them: a pruned network that keeps
those proportions is an ordinary, narrower member of its family, and plain transformers loads it. So the numbers are
read off the pruned network, the family's constructor is asked, and if every layer comes out as it is, that is its
configuration. Else it keeps the original's, and only fettle, which reads the widths, can build it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fettle.errors import ModelError
from fettle.vision.classifier import build_network
from fettle.vision.widths import Widths, widths_of

Numbers = Callable[[Mapping[str, Any], Widths], dict[str, Any]]


def plain_config(config: Mapping[str, Any], widths: Widths, folder: Path) -> dict[str, Any] | None:
    """The configuration of a network with these widths; None where the family cannot say them.

    Args:
        config: the original's.
        widths: of the whole pruned network.
        folder: named in errors.
    """
    numbers = _FAMILIES.get(str(config.get("model_type")))
    if numbers is None:
        return None
    found = {**config, **numbers(config, widths)}
    try:
        network = build_network(found, folder)
    except ModelError:
        return None
    return found if widths_of(network) == widths else None


def _resnet(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    return _stages("resnet", config, widths)


def _regnet(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    grouped = [value for value in widths.values() if len(value) == 3 and value[2] > 1]
    found = _stages("regnet", config, widths)
    return {**found, "groups_width": grouped[0][1] // grouped[0][2]} if grouped else found


def _stages(prefix: str, config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    """The stem's width, and that of each stage: what its first block's last convolution makes."""
    depths = config.get("depths") or (3, 4, 6, 3)
    sizes = []
    for stage in range(len(depths)):
        first = f"{prefix}.encoder.stages.{stage}.layers.0.layer."
        last = max(int(name[len(first) :].split(".")[0]) for name in widths if name.startswith(first))
        sizes.append(widths[f"{first}{last}.convolution"][0])
    return {"embedding_size": widths[f"{prefix}.embedder.embedder.convolution"][0], "hidden_sizes": sizes}


def _mobilenet(last: str, full: int) -> Numbers:
    """The multiplier of all widths, read off the last layer of `full`; floor and multiple as low as it needs."""

    def numbers(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
        made = [value[0] for value in widths.values() if len(value) == 3]
        found: dict[str, Any] = {"depth_multiplier": widths[last][0] / full, "min_depth": min(made)}
        if last.startswith("mobilenet_v2"):
            divisor = int(config.get("depth_divisible_by", 8))
            while divisor > 1 and any(width % divisor for width in made):
                divisor //= 2
            found |= {"depth_divisible_by": divisor, "finegrained_output": False}
        return found

    return numbers


_FAMILIES: dict[str, Numbers] = {
    "resnet": _resnet,
    "regnet": _regnet,
    "mobilenet_v1": _mobilenet("mobilenet_v1.layer.25.convolution", 1024),
    "mobilenet_v2": _mobilenet("mobilenet_v2.conv_1x1.convolution", 1280),
}
