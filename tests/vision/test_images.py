"""Images from folders, tensors and the drawn task; what is wrong with them is said."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.vision.networks import MEAN, STD

from fettle.errors import UsageError
from fettle.vision.images import SHAPES, read_images
from fettle.vision.preprocessing import Preprocessing, read_preprocessing
from fettle.vision.shapes import CLASSES, draw_shapes

SMALL = Preprocessing(3, (32, 32), 32, tuple(MEAN), tuple(STD))


def test_the_drawn_task_is_the_same_every_time_and_its_splits_differ() -> None:
    first, again, other = draw_shapes(50, seed=0), draw_shapes(50, seed=0), draw_shapes(50, seed=1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.images.dtype == torch.uint8 and first.images.shape == (50, 3, 32, 32)
    assert torch.bincount(first.labels).tolist() == [5] * len(CLASSES)
    plain, striped = (draw_shapes(200, seed=3, noise=0.0) for _ in range(2))
    assert torch.equal(plain.images, striped.images)


def test_labels_of_the_drawn_task_go_with_its_classes_alone() -> None:
    assert read_images(SHAPES, SMALL, CLASSES, held_out=True).data.labels is not None
    assert read_images(SHAPES, SMALL, [str(i) for i in range(1000)], held_out=True).data.labels is None


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_tensors_are_read_in_either_order_of_dimensions(kind: str, last: bool, tmp_path: Path) -> None:
    drawn = draw_shapes(20, seed=4)
    pixels = drawn.images.permute(0, 2, 3, 1).contiguous() if last else drawn.images
    path = tmp_path / f"images.{kind}"
    if kind == "npz":
        numpy.savez(path, images=pixels.numpy(), labels=drawn.labels.numpy())
    else:
        save_file({"images": pixels, "labels": drawn.labels}, path)
    found = read_images(path, SMALL, CLASSES)
    expected = (drawn.images.float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(found.data.images, expected)
    assert found.data.labels is not None and torch.equal(found.data.labels, drawn.labels)
    first, held = found.halves()
    assert len(first.data.images) == 16 and len(held.data.images) == 4
    seen = {float(image.sum()) for image in first.data.images}
    assert not seen & {float(image.sum()) for image in held.data.images}


def test_pictures_are_resized_cut_and_labelled_by_their_folders(tmp_path: Path) -> None:
    drawn = draw_shapes(4, seed=4)
    for number in range(4):
        folder = tmp_path / (CLASSES[number] if number % 2 else str(number))
        folder.mkdir()
        array = drawn.images[number].permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / "picture.png")
    wide = Image.new("RGB", (96, 48), (255, 0, 0))
    wide.save(tmp_path / "0" / "wide.png")
    found = read_images(tmp_path, SMALL, CLASSES)
    assert found.data.labels is not None
    by_label = dict(zip(found.data.labels.tolist(), found.data.images, strict=True))
    assert sorted(found.data.labels.tolist()) == [0, 0, 1, 2, 3]
    expected = (drawn.images[3].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(by_label[3], expected)
    red = found.data.images[[i for i, x in enumerate(found.data.images) if float(x.std((1, 2)).max()) < 1e-6]]
    torch.testing.assert_close(red[0][:, 0, 0], torch.tensor([2.0, -2.0, -2.0]))


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    drawn = draw_shapes(4, seed=0)

    def refused(arrays: dict[str, torch.Tensor], said: str) -> None:
        save_file(arrays, tmp_path / "bad.safetensors")
        with pytest.raises(UsageError, match=said):
            read_images(tmp_path / "bad.safetensors", SMALL, CLASSES)

    refused({"pictures": drawn.images}, "no array 'images'")
    refused({"images": drawn.images[:, :, :16].contiguous()}, "16 × 32, and this network takes 32 × 32")
    refused({"images": drawn.images[:, :2].contiguous()}, r"takes \[images, 3, height, width\]")
    refused({"images": drawn.images.int()}, "give uint8")
    refused({"images": drawn.images, "labels": drawn.labels[:2].contiguous()}, "one an image")
    refused({"images": drawn.images, "labels": drawn.labels + 10}, "classes are 0 to 9")
    refused({"images": torch.full((2, 3, 32, 32), torch.nan)}, "NaN")
    numpy.savez(tmp_path / "pickled.npz", images=numpy.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read"):
        read_images(tmp_path / "pickled.npz", SMALL, CLASSES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no pictures"):
        read_images(tmp_path / "empty", SMALL, CLASSES)
    (tmp_path / "empty" / "zebra").mkdir()
    with pytest.raises(UsageError, match="no class of this network"):
        read_images(tmp_path / "empty", SMALL, CLASSES)
    with pytest.raises(UsageError, match="there are no images"):
        read_images(tmp_path / "nowhere", SMALL, CLASSES)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("damage", ["huge", "broken"])
def test_a_picture_that_cannot_be_is_named(damage: str, tmp_path: Path) -> None:
    side = 60000 if damage == "huge" else 8
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    after = b"" if damage == "huge" else b"\x00\x00\x00\x04\x01\x02\x03\x04abcdabcd"
    body = chunk(b"IDAT", zlib.compress(bytes(200), 0)[:50]) + after
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(UsageError, match=r"picture\.png is no picture that can be read"):
        read_images(tmp_path, SMALL, CLASSES)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_the_middle_of_a_very_long_picture_is_taken(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.new("RGB", size, (255, 0, 0))
    picture.putpixel((size[0] // 2, size[1] // 2), (0, 255, 0))
    picture.save(tmp_path / "long.png")
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, how: made.append(to) or resize(self, to, how))
    found = read_images(tmp_path, SMALL, CLASSES)
    assert found.data.images.shape == (1, 3, 32, 32) and max(made[0]) <= 16 * 32
    assert float(found.data.images[0, 1].max()) > 0  # the green middle is seen


def test_a_folder_named_with_a_digit_that_is_no_number_is_said(tmp_path: Path) -> None:
    (tmp_path / "²").mkdir()
    with pytest.raises(UsageError, match="is no class of this network"):
        read_images(tmp_path, SMALL, CLASSES)


def test_sizes_come_from_either_librarys_words(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 256}, "do_center_crop": true, "crop_size": {"height": 224, "width": 200},'
        ' "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}'
    )
    found = read_preprocessing(tmp_path, {})
    assert (found.size, found.resize, found.mean, found.std) == ((224, 200), 256, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    timm = {"pretrained_cfg": {"input_size": [1, 28, 28], "mean": [0.5], "std": [0.5], "crop_pct": 0.875}}
    found = read_preprocessing(tmp_path / "none", timm)
    assert (found.channels, found.size, found.resize, found.mean) == (1, (28, 28), 32, (0.5,))
    assert read_preprocessing(tmp_path / "none", {}).size is None
