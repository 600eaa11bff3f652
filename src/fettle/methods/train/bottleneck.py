"""Bottleneck adapters: two small layers behind the attention and behind the MLP of every block; PEFT has none.

    h' = h + U · gelu(D · h)          D [rank, width], U [width, rank]

h is what a sublayer adds to the residual stream: the output of attention's last linear, and that of the MLP's. Houlsby
et al. 2019, https://arxiv.org/abs/1902.00751, figure 2, with biases. U begins at zero, so the model begins as the base.
Theirs train the norms as well; ours leave the base as it is, byte for byte.

They bend what passes through and cannot be merged into a matrix. Stored like PEFT's adapters, two files, with the
type BOTTLENECK, which PEFT itself refuses; `load_adapters` reads it. Parameters: 2 · blocks · (2 · width · rank +
rank + width).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fettle.errors import CheckpointError, RecipeError, UsageError, unknown_word
from fettle.models.config_file import read_json
from fettle.models.loading import LoadedModel
from fettle.models.storage import module_name
from fettle.models.writer import write_json, write_shard

TYPE = "BOTTLENECK"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROLES = ("output", "down")


class Bottleneck(nn.Module):
    """One adapter: [..., width] → [..., width]."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, device=device), nn.Linear(rank, width, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Tensor) -> Tensor:
        """What is added."""
        found: Tensor = self.up(nn.functional.gelu(self.down(states)))
        return found


class Widened(nn.Module):
    """A sublayer's last linear with adapters behind it, of which one is used."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.width = inner, width
        self.adapters = nn.ModuleDict()
        self.active = ""

    def forward(self, inputs: Tensor) -> Tensor:
        """The linear, and what the active adapter adds."""
        found: Tensor = self.inner(inputs)
        return found if not self.active else found + self.adapters[self.active](found)


class BottleneckModel(nn.Module):
    """A tree with bottleneck adapters by name; `set_adapter(name)` chooses."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Puts places for adapters into the tree.

        Raises:
            RecipeError: no linear of the model ends a sublayer.
        """
        super().__init__()
        self.tree = loaded.model
        self.config = loaded.model.config
        linears = [
            x for block in loaded.anatomy.blocks for x in block.linears if x.role in ROLES and x.slot.index is None
        ]
        if not linears:
            raise RecipeError(
                f"a {loaded.anatomy.family} model has no linear of the roles {', '.join(ROLES)}; use lora"
            )
        self.places: dict[str, Widened] = {}
        for linear in linears:
            path = module_name(linear)
            parent, _, leaf = path.rpartition(".")
            widened = Widened(loaded.model.get_submodule(path), linear.shape[0])
            setattr(loaded.model.get_submodule(parent), leaf, widened)
            self.places[path] = widened

    def add(self, name: str, rank: int) -> None:
        """A fresh adapter under a name, which alone learns and is used from here on."""
        device = next(self.tree.parameters()).device
        for widened in self.places.values():
            widened.adapters[name] = Bottleneck(widened.width, rank, device)
        for key, parameter in self.tree.named_parameters():
            parameter.requires_grad_(f".adapters.{name}." in f".{key}")
        self.set_adapter(name)

    def set_adapter(self, name: str) -> None:
        """Chooses one of the adapters.

        Raises:
            UsageError: there is none of this name.
        """
        known = next(iter(self.places.values())).adapters
        if name not in known:
            raise UsageError(unknown_word("adapter", name, list(known)))
        for widened in self.places.values():
            widened.active = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the tree."""
        return self.tree(*args, **kwargs)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is stored of an adapter."""
        return {
            f"{path}.{key}": value.detach().contiguous().cpu()
            for path, widened in self.places.items()
            for key, value in widened.adapters[name].state_dict().items()
        }


def write_bottleneck(model: BottleneckModel, name: str, rank: int, folder: Path) -> None:
    """Writes one adapter's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder, WEIGHTS, model.tensors(name), {"format": "pt"})
    write_json(folder / CONFIG, {"peft_type": TYPE, "task_type": "CAUSAL_LM", "rank": rank})


def is_bottleneck(folder: Path) -> bool:
    """Whether a folder holds one."""
    path = folder / CONFIG
    return path.is_file() and read_json(path).get("peft_type") == TYPE


def load_bottlenecks(loaded: LoadedModel, adapters: Mapping[str, Path]) -> BottleneckModel:
    """The base with these adapters, the first of which is used.

    Raises:
        CheckpointError: an adapter that does not fit the base.
    """
    model = BottleneckModel(loaded)
    for name, folder in adapters.items():
        rank = read_json(folder / CONFIG).get("rank")
        if not isinstance(rank, int) or rank < 1:
            raise CheckpointError(f"{folder / CONFIG} is damaged: rank is {rank!r}, and must be an integer from 1")
        model.add(name, rank)
        stored, wanted = load_file(folder / WEIGHTS), model.tensors(name)
        if {key: value.shape for key, value in stored.items()} != {key: value.shape for key, value in wanted.items()}:
            raise CheckpointError(f"the adapter in {folder} has other tensors than this base has places for")
        for path, widened in model.places.items():
            part = {key.removeprefix(f"{path}."): value for key, value in stored.items() if key.startswith(f"{path}.")}
            widened.adapters[name].load_state_dict(part)
    model.set_adapter(next(iter(adapters)))
    return model.eval()
