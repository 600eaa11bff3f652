"""What an image goes through before the network sees it: resized, cropped, scaled and normalized.

Read from `preprocessor_config.json` (transformers) or `pretrained_cfg` in config.json (timm); where neither says
anything, pixels are divided by 255 and any size is taken.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.models.config_file import damaged, read_json

DEFAULT_SIZE = 224
LARGEST_SIDE = 4096
LARGEST_NUMBER = 1e6  # of a mean or a standard deviation


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
    """What `folder` says about its images.

    Raises:
        CheckpointError: a size, mean or standard deviation that cannot be.
    """
    path, own = folder / "preprocessor_config.json", folder / "config.json"
    found = read_json(path) if path.exists() else {}
    timm = config.get("pretrained_cfg") or {}
    if not isinstance(timm, Mapping):
        raise damaged(own, f"pretrained_cfg is {shown(timm)}, and must be an object")
    channels, size, resize = _timm_sizes(own, timm)
    if config.get("num_channels"):
        channels = whole(own, "num_channels", config["num_channels"])
    asked = _sides(path, "size", found.get("size"))
    if asked is not None:
        resize, size = min(asked), asked
        if found.get("do_center_crop"):
            size = _sides(path, "crop_size", found.get("crop_size")) or size
        elif isinstance(found["size"], Mapping) and found["size"].get("shortest_edge") is not None:
            resize = _enlarged(path, min(asked), found.get("crop_pct"))  # ConvNeXt's: resized by more, then cropped
    elif size is None and isinstance(config.get("image_size"), int):
        resize = whole(own, "image_size", config["image_size"])
        size = (resize, resize)
    if found.get("do_normalize") is False:
        return Preprocessing(channels, size, resize, (0.0,) * channels, (1.0,) * channels)
    mean, std = (
        _numbers(path, f"image_{key}", found.get(f"image_{key}"), channels)
        or _numbers(own, f"pretrained_cfg.{key}", timm.get(key), channels)
        for key in ("mean", "std")
    )
    return Preprocessing(channels, size, resize, mean or (0.0,) * channels, std or (1.0,) * channels)


def whole(path: Path, key: str, value: Any, most: int = LARGEST_SIDE) -> int:
    """`value` of `key` in `path`; CheckpointError unless it is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise damaged(path, f"{key} is {shown(value)}, and must be a whole number from 1 to {most}")
    return value


def shown(value: Any) -> str:
    """A value from a file, short enough for a message."""
    return reprlib.repr(value)


def _timm_sizes(path: Path, timm: Mapping[str, Any]) -> tuple[int, tuple[int, int] | None, int | None]:
    """Colours, size and the shorter side before the crop, from timm's words."""
    key, given = "pretrained_cfg.input_size", timm.get("input_size")
    if not given:
        return 3, None, None
    if not isinstance(given, list | tuple) or len(given) != 3:
        raise damaged(path, f"{key} is {shown(given)}, and must be [colours, height, width]")
    channels, height, width = (whole(path, key, value) for value in given)
    return channels, (height, width), _enlarged(path, height, timm.get("crop_pct"))


def _enlarged(path: Path, side: int, share: Any) -> int:
    """The side before the crop that keeps `share` of it."""
    if not share:
        return side
    if not _is_number(share) or not 1 <= side / share <= LARGEST_SIDE:
        raise damaged(
            path, f"crop_pct is {shown(share)}, and must be a share of the side from {side / LARGEST_SIDE:.3g} to 1"
        )
    return round(side / float(share))


def _sides(path: Path, key: str, value: Any) -> tuple[int, int] | None:
    if isinstance(value, Mapping):
        if value.get("shortest_edge") is not None:
            side = whole(path, f"{key}.shortest_edge", value["shortest_edge"])
            return side, side
        if value.get("height") is None and value.get("width") is None:
            return None
        height, width = (whole(path, f"{key}.{name}", value.get(name)) for name in ("height", "width"))
        return height, width
    if value is None or isinstance(value, list):
        return None
    side = whole(path, key, value)
    return side, side


def _numbers(path: Path, key: str, values: Any, channels: int) -> tuple[float, ...] | None:
    """A number a colour; None where nothing is said, or of another number of colours."""
    if not isinstance(values, list | tuple):
        return None
    divides = key.endswith("std")
    if not all(_is_number(x) and abs(x) <= LARGEST_NUMBER and (x > 0 or not divides) for x in values):
        what = "numbers above 0" if divides else "numbers"
        raise damaged(path, f"{key} is {shown(values)}, and must be {what} of at most {LARGEST_NUMBER:.0f}")
    return tuple(map(float, values)) if len(values) == channels else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
