"""Images and labels from what the user names: a folder of pictures, a file of tensors, or the task that is made.

    FOLDER/CLASS/picture.png     a folder for each class (its name, or its number); without such folders: no labels
    FILE.npz, FILE.safetensors   `images`, and `labels` where there are any
    shapes                       the embedded task (`shapes.py`): one split to calibrate on, another to measure on

`images` is uint8 [images, channels, height, width] (or channels last), which is normalized as the model's folder says,
or float32, which is taken as it is. No pickle is ever opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fettle.errors import UsageError
from fettle.methods.filters.scores import ImageBatch
from fettle.vision.preprocessing import Preprocessing
from fettle.vision.shapes import CLASSES, draw_shapes

SHAPES = "shapes"
CALIBRATION_IMAGES, HELD_OUT_IMAGES = 4000, 1000
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LONGEST = 16  # a picture's longer side, in shorter sides; beyond that its ends are cut off before it is resized
HELD_BACK = 5  # one image of so many is kept for measuring


@dataclass(frozen=True)
class ImageSet:
    """Images that a network can take.

    Attributes:
        data: normalized images and labels.
        source: the name of the file or folder, or `shapes`.
        sha256: of pixels and labels as they were read.
    """

    data: ImageBatch
    source: str
    sha256: str

    def on(self, device: str) -> ImageSet:
        """The same images on a device."""
        labels = self.data.labels
        moved = ImageBatch(self.data.images.to(device), None if labels is None else labels.to(device))
        return ImageSet(moved, self.source, self.sha256)

    def halves(self) -> tuple[ImageSet, ImageSet]:
        """What is calibrated and healed on, and what is held back to measure on: every fifth image of a fixed draw."""
        count = len(self.data.images)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        held = order % HELD_BACK == 0 if count >= 2 * HELD_BACK else torch.ones(count, dtype=torch.bool)
        kept = ~held if count >= 2 * HELD_BACK else held
        first, second = (
            ImageSet(ImageBatch(self.data.images[mask], _rows(self.data.labels, mask)), self.source, self.sha256)
            for mask in (kept, held)
        )
        return first, second


def read_images(
    source: str | Path, preprocessing: Preprocessing, labels: Sequence[str], *, held_out: bool = False
) -> ImageSet:
    """The images that `source` names, normalized for this network.

    Args:
        source: a folder, an .npz or .safetensors file, or "shapes".
        preprocessing: what the model's folder says about its images.
        labels: the names of the network's classes.
        held_out: of the embedded task, the split to measure on.

    Raises:
        UsageError: nothing of that kind is there, or images and labels that do not fit the network.
    """
    if str(source) == SHAPES:
        return _embedded(preprocessing, labels, held_out)
    path = Path(source)
    if path.is_dir():
        pixels, numbers = _from_folder(path, preprocessing, labels)
    elif path.is_file() and path.suffix in (".npz", ".safetensors"):
        pixels, numbers = _from_file(path, preprocessing)
    else:
        raise UsageError(
            f"there are no images in {str(source)!r}; give a folder of pictures, an .npz or .safetensors file with "
            f"'images' and 'labels', or {SHAPES}"
        )
    if not len(pixels):
        raise UsageError(f"{path} holds no image")
    _check_labels(path, numbers, len(pixels), len(labels))
    if pixels.dtype == torch.uint8:
        images = preprocessing.normalized(pixels)
    else:
        preprocessing.require_shape(pixels)
        images = pixels.float()
    if not bool(torch.isfinite(images).all()):
        raise UsageError(f"{path}: 'images' holds NaN or infinity")
    return ImageSet(ImageBatch(images, numbers), path.name, _sha256(pixels, numbers))


def _embedded(preprocessing: Preprocessing, labels: Sequence[str], held_out: bool) -> ImageSet:
    """The embedded task in the network's size; its labels only where the network's classes are the task's."""
    height, width = preprocessing.example_size
    if preprocessing.channels != 3 or height != width:
        raise UsageError(
            f"the embedded images are square and in three colours, and this network takes {preprocessing.channels} × "
            f"{height} × {width}; give images of your own"
        )
    count = HELD_OUT_IMAGES if held_out else CALIBRATION_IMAGES
    if height > 64:  # of large images fewer do, and more would take gigabytes
        count //= 10
    drawn = draw_shapes(count, seed=1 if held_out else 0, side=height)
    numbers = drawn.labels if tuple(labels) == CLASSES else None
    name = f"{SHAPES}, {'held out' if held_out else 'calibration'}"
    return ImageSet(ImageBatch(preprocessing.normalized(drawn.images), numbers), name, _sha256(drawn.images, numbers))


def _from_file(path: Path, preprocessing: Preprocessing) -> tuple[Tensor, Tensor | None]:
    try:
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as held:
                arrays = {name: torch.from_numpy(held[name]) for name in held.files}
        else:
            from safetensors.torch import load_file

            arrays = load_file(path)
    except Exception as error:  # numpy and safetensors raise all kinds for a damaged file
        raise UsageError(f"{path} cannot be read: {error}") from error
    if "images" not in arrays:
        raise UsageError(f"{path} has no array 'images'; it has {', '.join(sorted(arrays)) or 'none'}")
    pixels = arrays["images"]
    if pixels.ndim == 4 and pixels.shape[1] != preprocessing.channels and pixels.shape[3] == preprocessing.channels:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise UsageError(f"{path}: 'images' is {pixels.dtype}; give uint8 pixels, or float32 that is normalized")
    labels = arrays.get("labels")
    return pixels, None if labels is None else labels.long()


def _from_folder(path: Path, preprocessing: Preprocessing, labels: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    found: list[tuple[Path, int | None]] = []
    for folder in classes:
        number = _class_number(folder, labels)
        found += [(file, number) for file in sorted(folder.iterdir()) if file.suffix.lower() in PICTURES]
    found += [(file, None) for file in sorted(path.iterdir()) if file.suffix.lower() in PICTURES]
    if not found:
        raise UsageError(f"{path} holds no pictures ({', '.join(PICTURES)}), nor folders of them")
    pixels = torch.stack([_picture(file, preprocessing) for file, _ in found])
    numbers = [number for _, number in found]
    known = [number for number in numbers if number is not None]
    return pixels, torch.tensor(known) if len(known) == len(numbers) else None


def _class_number(folder: Path, labels: Sequence[str]) -> int:
    if folder.name in labels:
        return list(labels).index(folder.name)
    if folder.name.isdecimal() and int(folder.name) < len(labels):
        return int(folder.name)
    raise UsageError(
        f"{folder} is no class of this network: it knows {', '.join(labels[:5])}{', …' if len(labels) > 5 else ''}; "
        f"name the folder so, or by a number below {len(labels)}"
    )


def _picture(path: Path, preprocessing: Preprocessing) -> Tensor:
    """uint8 [channels, height, width]: the picture, its shorter side resized, its middle cut out."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(
            "reading pictures needs Pillow, which is not installed; pip install 'fettle-llm[vision]', or give an .npz "
            "or .safetensors file"
        ) from None
    height, width = preprocessing.example_size
    try:
        with Image.open(path) as opened:
            image: Any = opened.convert("L" if preprocessing.channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path} is no picture that can be read: {error}; remove it, or save it again as one of "
            f"{', '.join(PICTURES)}, with less than {Image.MAX_IMAGE_PIXELS or 0:,} pixels"
        ) from error
    image = _middle(image)
    share = max(preprocessing.resize or min(height, width), height, width) / min(image.size)
    image = image.resize(
        (max(width, round(image.width * share)), max(height, round(image.height * share))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = torch.from_numpy(numpy.array(image.crop((left, top, left + width, top + height))))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _middle(image: Any) -> Any:
    """The middle of a very long picture, which alone is seen: else one row of pixels would be resized to gigabytes."""
    most = LONGEST * min(image.size)
    width, height = min(image.width, most), min(image.height, most)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def _check_labels(path: Path, labels: Tensor | None, images: int, classes: int) -> None:
    if labels is None:
        return
    if labels.shape != (images,):
        raise UsageError(f"{path}: {images} images, and 'labels' has the shape {list(labels.shape)}; give one an image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UsageError(f"{path}: labels from {low} to {high}; this network's classes are 0 to {classes - 1}")


def _rows(labels: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if labels is None else labels[mask]


def _sha256(pixels: Tensor, labels: Tensor | None) -> str:
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    for tensor in (pixels, labels):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
