"""What an image goes through before the network sees it: resized, cropped, scaled and normalized.

Read from `preprocessor_config.json` (transformers) or `pretrained_cfg` in config.json (timm); where neither says
anything, pixels are divided by 255 and any size is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.models.config_file import read_json

DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Preprocessing:
    """What the folder says about its images.

    Attributes:
        size: height and width that the network was made for; None where the folder does not say.
        resize: the shorter side before the crop.
        mean, std: of each colour, of values from 0 to 1.
    """

    channels: int
    size: tuple[int, int] | None
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def example_size(self) -> tuple[int, int]:
        """Height and width of the images that a network is traced and counted with."""
        return self.size or (DEFAULT_SIZE, DEFAULT_SIZE)

    def example(self) -> Tensor:
        """float32 [1, channels, height, width] of noise, the same every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, self.channels, *self.example_size, generator=generator)

    def normalized(self, pixels: Tensor) -> Tensor:
        """float32 [images, channels, height, width] from uint8 of that shape.

        Raises:
            UsageError: another number of colours, or another size than the network's.
        """
        self.require_shape(pixels)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def require_shape(self, images: Tensor) -> None:
        """Raises UsageError for images of another shape than the network takes."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise UsageError(
                f"the images have the shape {list(images.shape)}; this network takes [images, {self.channels}, height, "
                "width]"
            )
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            raise UsageError(
                f"the images are {images.shape[2]} × {images.shape[3]}, and this network takes {self.size[0]} × "
                f"{self.size[1]}; give images of that size, or a folder of image files, which are resized"
            )


def read_preprocessing(folder: Path, config: Mapping[str, Any]) -> Preprocessing:
    """What `folder` says about its images."""
    path = folder / "preprocessor_config.json"
    found = read_json(path) if path.exists() else {}
    timm = config.get("pretrained_cfg") or {}
    channels = int(config.get("num_channels") or (timm.get("input_size") or (3,))[0])
    resize, size = None, None
    if timm.get("input_size"):
        size = (int(timm["input_size"][1]), int(timm["input_size"][2]))
        resize = round(size[0] / float(timm.get("crop_pct") or 1))
    asked = _sides(found.get("size"))
    if asked is not None:
        resize, size = min(asked), asked
        if found.get("do_center_crop"):
            size = _sides(found.get("crop_size")) or size
        elif "shortest_edge" in (found["size"] if isinstance(found["size"], dict) else {}):
            share = float(found.get("crop_pct") or 1)  # ConvNeXt's: resized by more, then cropped
            resize = round(min(asked) / share)
    elif size is None and isinstance(config.get("image_size"), int):
        size = (config["image_size"], config["image_size"])
        resize = size[0]
    plain = found.get("do_normalize") is False
    mean = (0.0,) * channels if plain else _numbers(found.get("image_mean") or timm.get("mean"), channels, 0.0)
    std = (1.0,) * channels if plain else _numbers(found.get("image_std") or timm.get("std"), channels, 1.0)
    return Preprocessing(channels, size, resize, mean, std)


def _sides(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and "shortest_edge" in value:
        return int(value["shortest_edge"]), int(value["shortest_edge"])
    if isinstance(value, Mapping) and "height" in value:
        return int(value["height"]), int(value["width"])
    return None


def _numbers(values: Any, channels: int, default: float) -> tuple[float, ...]:
    if isinstance(values, list | tuple) and len(values) == channels:
        return tuple(map(float, values))
    return (default,) * channels
