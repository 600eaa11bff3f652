"""VGG, which transformers does not have: convolutions of 3 × 3 in five stages, and two wide layers before the classes.

Simonyan, Zisserman 2015, https://arxiv.org/abs/1409.1556. The names of the weights and `config.json` are those of the
folders that timm publishes (`timm/vgg16.tv_in1k` and its like: torchvision's weights as safetensors), so those open
here without timm or torchvision:

    {"architecture": "vgg16_bn", "num_classes": 1000,
     "pretrained_cfg": {"mean": …, "std": …, "input_size": [3, 224, 224]}}

`model_args` may say other widths, which timm itself has no word for: `channels` (a number a convolution), `head_width`
and `head_kernel`, the size of the map that the first wide layer reads (7; 1 for small images); `drop_rate` is its own
word, 0 unless given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

#: convolutions in each stage
STAGES = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
HEAD_WIDTH, HEAD_KERNEL = 4096, 7
ARCHITECTURES = tuple(name + suffix for name in STAGES for suffix in ("", "_bn"))


class _WideLayers(nn.Module):
    """Two linear layers over a map, written as convolutions; a smaller map is spread to the kernel's size first."""

    def __init__(self, channels: int, width: int, kernel: int, drop_rate: float) -> None:
        super().__init__()
        self.kernel = kernel
        self.fc1 = nn.Conv2d(channels, width, kernel)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[images, channels, height, width] → [images, head_width, height - kernel + 1, width - kernel + 1]."""
        if min(x.shape[-2:]) < self.kernel:
            height, width = x.shape[-2:]
            x = functional.adaptive_avg_pool2d(x, (max(self.kernel, height), max(self.kernel, width)))
        x = functional.relu(self.fc1(x))
        return functional.relu(self.fc2(self.drop(x)))


class _Classes(nn.Module):
    """The mean over the map, and a linear layer."""

    def __init__(self, width: int, classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[images, width, height, width] → [images, classes]."""
        return self.fc(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


class Vgg(nn.Module):
    """A VGG network; `forward` gives the logits as a tensor."""

    def __init__(
        self,
        architecture: str,
        *,
        num_classes: int,
        in_channels: int = 3,
        channels: Sequence[int] | None = None,
        head_width: int = HEAD_WIDTH,
        head_kernel: int = HEAD_KERNEL,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stages = STAGES[architecture.removesuffix("_bn")]
        widths = list(channels or [width for width, count in zip(WIDTHS, stages, strict=True) for _ in range(count)])
        if len(widths) != sum(stages):
            raise ValueError(f"channels has {len(widths)} numbers, and {architecture} has {sum(stages)} convolutions")
        layers: list[nn.Module] = []
        before, taken = in_channels, 0
        for count in stages:
            for width in widths[taken : taken + count]:
                layers.append(nn.Conv2d(before, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if architecture.endswith("_bn") else []
                layers.append(nn.ReLU())
                before = width
            taken += count
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pre_logits = _WideLayers(before, head_width, head_kernel, drop_rate)
        self.head = _Classes(head_width, num_classes, drop_rate)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, channels, height, width] → logits [images, classes]."""
        return self.head(self.pre_logits(self.features(pixel_values)))  # type: ignore[no-any-return]


def is_vgg(config: Mapping[str, Any]) -> bool:
    """Whether a timm configuration names a VGG."""
    return str(config.get("architecture", "")) in ARCHITECTURES


def build_vgg(config: Mapping[str, Any]) -> Vgg:
    """The network that such a configuration describes; ValueError or TypeError where it cannot be."""
    arguments = dict(config.get("model_args") or {})
    input_size = (config.get("pretrained_cfg") or {}).get("input_size", (3, 224, 224))
    return Vgg(
        config["architecture"], num_classes=int(config.get("num_classes", 1000)), in_channels=int(input_size[0]),
        **arguments,
    )  # fmt: skip
