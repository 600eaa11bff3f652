"""An image classifier's folder, opened: its network with its weights, its classes, and what its images go through.

Which networks: what transformers builds for `…ForImageClassification` (ResNet, MobileNetV1 and V2, RegNet, …), VGG in
timm's folders (`vgg.py`), and other timm architectures through transformers' wrapper where timm is installed. A folder
that fettle pruned is the original's configuration, with the widths of `fettle.json`: the network is built on the meta
device, made as wide as they say, and filled; every tensor's shape is checked. Nothing is unpickled, no code that comes
with a model is run, and a damaged tensor is found by its hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fettle.errors import CheckpointError, ModelError
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.config_file import damaged, read_json
from fettle.models.source import resolve
from fettle.vision.preprocessing import Preprocessing, read_preprocessing, shown, whole
from fettle.vision.vgg import build_vgg, is_vgg
from fettle.vision.widths import set_widths_

KIND = "image_classifier"
SUFFIX = "ForImageClassification"
TIMM = "timm_wrapper"  # transformers' model_type for a timm network
MOST_CLASSES = 1_000_000
WRAPPED = "timm_model."  # what transformers puts before the names of a wrapped timm network
COUNTER = "num_batches_tracked"  # of batch norms; old files lack it, and nothing reads it


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier, ready to answer.

    Attributes:
        model: the network; `model(images)` gives logits, or an object with `.logits`.
        labels: the names of its classes.
        preprocessing: what its images go through.
        checkpoint: its files.
    """

    model: nn.Module
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.checkpoint.folder


def is_image_classifier(folder: Path) -> bool:
    """Whether a folder's config.json names an image classifier, in transformers' words or timm's."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return any(name.endswith(SUFFIX) for name in names) or isinstance(config.get("architecture"), str)


def open_classifier(model: str | Path, *, device: str = "cpu", record: dict[str, Any] | None = None) -> ImageClassifier:
    """Opens a folder or hub id; float32, in eval mode.

    Args:
        model: a folder or hub id.
        device: where it is put.
        record: what fettle.json will say, for a folder that is being written.

    Raises:
        ModelError: an architecture that cannot be built here.
        CheckpointError: damaged files, or tensors that do not fit.
    """
    checkpoint = Checkpoint.open(resolve(model))
    if record is not None:
        checkpoint = dataclasses.replace(checkpoint, record=record)
    checkpoint.verify_hashes()
    network = build_network(checkpoint.config, checkpoint.folder)
    widths = (checkpoint.record or {}).get("widths")
    if isinstance(widths, Mapping):
        set_widths_(network, widths)
    _fill(network, checkpoint)
    preprocessing = read_preprocessing(checkpoint.folder, checkpoint.config)
    network.to(device).eval()
    path = checkpoint.folder / "config.json"
    return ImageClassifier(network, class_names(checkpoint.config, path), preprocessing, checkpoint)


def build_network(config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The network that a configuration describes, every parameter and buffer on meta.

    Raises:
        ModelError: it cannot be built here; says why.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    fields = {key: value for key, value in config.items() if key != "quantization_config"}
    fields.setdefault("model_type", TIMM)
    if fields["model_type"] == TIMM and not is_vgg(config):
        _refuse_reaching_out(config, folder / "config.json")
    try:
        with torch.device("meta"):
            if is_vgg(config):
                return build_vgg(config)
            found = transformers.AutoConfig.for_model(**fields)
            network: nn.Module = transformers.AutoModelForImageClassification.from_config(found)
            return network
    except ImportError as error:
        raise ModelError(
            f"config.json in {folder} names the timm architecture {config.get('architecture')!r}, and timm is not "
            "installed; pip install timm, or use a model that transformers has itself"
        ) from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        RuntimeError,
        StrictDataclassError,
    ) as e:
        raise ModelError(
            f"transformers {transformers.__version__} cannot build the image classifier that config.json in {folder} "
            f"describes: {' '.join(str(e).split())[:300]}. Check the values there."
        ) from e


def _refuse_reaching_out(config: Mapping[str, Any], path: Path) -> None:
    """Raises ModelError where timm would open other files or a hub; it unpickles what `checkpoint_path` names."""
    name, arguments = config.get("architecture"), config.get("model_args") or {}
    if name is not None and (not isinstance(name, str) or ":" in name or "/" in name):
        raise ModelError(
            f"{path} names the timm architecture {name!r}; only a plain name such as 'resnet50' is taken, without ':' "
            "or '/', which lead to other files. Correct it there"
        )
    if not isinstance(arguments, Mapping):
        raise ModelError(f"{path}: model_args is {arguments!r}, and must be an object. Correct it there")
    reaching = sorted(
        key for key in arguments if key.startswith("pretrained") or key in ("checkpoint_path", "cache_dir")
    )
    if reaching:
        raise ModelError(
            f"{path}: model_args holds {', '.join(reaching)}, with which timm reads weights from elsewhere; weights "
            "come from the model's own safetensors alone. Remove what is named here"
        )


def class_names(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The classes' names, by number; CheckpointError where `config`, read from `path`, says what cannot be."""
    named = config.get("id2label")
    if isinstance(named, Mapping) and named:
        try:
            return tuple(str(named[key]) for key in sorted(named, key=int))
        except ValueError:
            raise damaged(path, f"id2label has the keys {shown(list(named))}, and must have whole numbers") from None
    listed = config.get("label_names")
    if isinstance(listed, list) and listed:
        return tuple(map(str, listed))
    key = "num_labels" if config.get("num_labels") else "num_classes"
    return tuple(map(str, range(whole(path, key, config.get(key) or 2, MOST_CLASSES))))


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is stored, under the name that it has in files."""
    for name, tensor in network.state_dict().items():
        yield name.removeprefix(WRAPPED), tensor


def _fill(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts every tensor of the files where it belongs; CheckpointError for one that is missing or of another shape."""
    places = {name.removeprefix(WRAPPED): name for name in network.state_dict()}
    for name, place in places.items():
        owner_name, _, leaf = place.rpartition(".")
        owner = network.get_submodule(owner_name)
        if name not in checkpoint.entries and leaf == COUNTER:
            owner._buffers[leaf] = torch.zeros((), dtype=torch.int64)
            continue
        stored = name if name in checkpoint.entries else place
        value = checkpoint.read(stored)
        check_finite(stored, value)
        parameter = owner._parameters.get(leaf)
        held = owner._buffers[leaf] if parameter is None else parameter
        assert held is not None, place
        if held.shape != value.shape:
            raise CheckpointError(
                f"tensor {stored!r} has shape {list(value.shape)}; the network has {list(held.shape)} there. A network "
                "that was pruned needs the fettle.json beside it, which says its widths"
            )
        if parameter is None:
            owner._buffers[leaf] = value.float() if value.is_floating_point() else value
        else:
            owner._parameters[leaf] = nn.Parameter(value.float())
    loose = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if loose:
        raise ModelError(f"buffer {loose[0]!r} of {type(network).__name__} is in no file, and cannot be computed")
