"""A whole model in memory, ready to answer: what `fettle.load` gives.

What: the transformers model is built on the meta device and filled tensor by tensor from the shards. A matrix stored as
codes becomes a `QuantizedLinear`, which keeps the codes and multiplies with them; where transformers has no `nn.Linear`
(GPT-2's Conv1D, stacked experts, embeddings) it is dequantized into the dense parameter.

Safety: a folder that fettle wrote is verified first, tensor by tensor, against the hashes in `fettle.json`; every dense
weight is checked for NaN and infinity. Cost: one read of the files for the hashes, one for the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fettle.errors import CheckpointError, ModelError, require_readable
from fettle.layers import QuantizedLinear
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.config_file import check_token_ids, read_json
from fettle.models.module_tree import build_tree, parameter_of, place_parameter
from fettle.models.parts import Linear
from fettle.models.shared_tensors import is_part
from fettle.models.source import resolve
from fettle.models.storage import StoredScheme, read_input_quantizer, read_quantized, read_weight, stored_schemes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class LoadedModel:
    """`model` is the transformers model (its `.generate` works), `tokenizer` None where the folder has none."""

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    folder: Path


def load(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    generic: bool = False,
    verify: bool = True,
    dense: bool = False,
) -> LoadedModel:
    """Loads `model` ("demo", a folder or a hub id), compressed or not, for running; `dense` decodes every matrix.

    Raises `ModelError` (`CheckpointError` for damage, `UnknownFamilyError`, `NonFiniteError`), naming the tensor.
    """
    folder = resolve(model)
    checkpoint = Checkpoint.open(folder)
    if verify:
        checkpoint.verify_hashes()
    found = load_checkpoint(checkpoint, device=device, dtype=dtype, generic=generic, dense=dense)
    return replace(found, model=_with_generation_settings(found.model, folder), tokenizer=_tokenizer(folder))


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    generic: bool = False,
    dense: bool = False,
) -> LoadedModel:
    """The same for a checkpoint that is open, or a view of one, without tokenizer and settings for generation."""
    anatomy = read_anatomy(checkpoint, generic=generic)
    tree = build_tree(checkpoint, anatomy, dtype, device)
    _Filler(checkpoint, anatomy, tree, torch.device(device), dtype, dense).fill()
    return LoadedModel(tree, None, anatomy, checkpoint.folder)


def _tokenizer(folder: Path) -> Any:
    """As `data.load_tokenizer`, which this room may not know: the rooms of models and of text are on one floor."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the libraries underneath raise all kinds, down to a bare Exception for bad JSON
        require_readable(folder, TOKENIZER_FILES)
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}. Download the model again.") from error


def _with_generation_settings(tree: nn.Module, folder: Path) -> nn.Module:
    if (folder / "generation_config.json").exists() and hasattr(tree, "generation_config"):
        from transformers import GenerationConfig

        path = folder / "generation_config.json"
        check_token_ids(path, read_json(path))
        try:
            tree.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # as with the tokenizer: all kinds
            raise ModelError(f"{path} cannot be used: {error}. Correct it, or download it again.") from error
    return tree


class _Filler:
    """Fills one tree from one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        tree: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        dense: bool,
    ) -> None:
        self.checkpoint, self.anatomy, self.tree, self.device, self.dtype = checkpoint, anatomy, tree, device, dtype
        self.dense = dense
        self.stored = stored_schemes(checkpoint, anatomy)

    @torch.no_grad()
    def fill(self) -> None:
        """Puts every tensor where it belongs; raises `CheckpointError` naming parameters that got none."""
        done: set[str] = set()
        outside = [x for x in (self.anatomy.embedding, self.anatomy.head) if x is not None]
        if self.anatomy.tied:
            outside = outside[:1]
        for linear in (*self.anatomy.linears(), *outside):
            self._place_linear(linear, self.stored.get(linear.name))
            done.add(linear.name)
        for name in self.checkpoint.entries:
            owner, _, leaf = name.rpartition(".")
            if not is_part(name) and not (owner in done and leaf.startswith(("weight", "input_"))):
                self._place_other(name)
        self._tie()
        empty = [name for name, parameter in self.tree.named_parameters() if parameter.is_meta]
        if empty:
            raise CheckpointError(
                f"{self.checkpoint.folder} has no tensor for {', '.join(empty[:5])}"
                + (f" and {len(empty) - 5} more." if len(empty) > 5 else ".")
            )

    def _place_linear(self, linear: Linear, stored: StoredScheme | None) -> None:
        path = linear.slot.parameter.removesuffix(".weight")
        is_module = linear.slot.index is None and type(self.tree.get_submodule(path)) is nn.Linear
        if stored is not None and is_module and not self.dense:
            self._swap(path, linear, stored)
            return
        weight = read_weight(self.checkpoint, linear, stored).to(self.device, self.dtype)  # [out, in]
        quantizer = read_input_quantizer(self.checkpoint, linear, stored)
        if quantizer is not None:  # GPT-2's Conv1D
            module = self.tree.get_submodule(path)
            module.register_forward_pre_hook(lambda _, read: (quantizer(read[0]), *read[1:]))
        if linear.slot.transposed:
            weight = weight.T
        if linear.slot.index is None:
            self._place(linear.slot.parameter, linear.weight_name, weight.contiguous())
            return
        stack = parameter_of(self.tree, linear.slot.parameter)  # [experts, out, in]
        assert stack is not None, linear.slot
        if stack.is_meta:
            stack = torch.empty(stack.shape, dtype=self.dtype, device=self.device)
            place_parameter(self.tree, linear.slot.parameter, stack)
        expert = stack[linear.slot.index]
        target = expert if linear.slot.rows is None else expert[linear.slot.rows[0] : linear.slot.rows[1]]
        target.copy_(weight)

    def _swap(self, path: str, linear: Linear, stored: StoredScheme) -> None:
        """Replaces the nn.Linear at `path` by one that keeps the codes."""
        quantized = read_quantized(self.checkpoint, linear, stored)
        bias = f"{linear.weight_name.removesuffix('.weight')}.bias"
        value = None
        if self.tree.get_submodule(path).bias is not None:  # what the model has no place for is left out
            value = self.checkpoint.read(bias)
            check_finite(bias, value)
            if value.shape != (linear.shape[0],):
                raise CheckpointError(f"tensor {bias!r} has shape {list(value.shape)}, expected [{linear.shape[0]}].")
            value = value.to(self.dtype)
        swapped = QuantizedLinear.from_quantized(quantized, value, stored.storage).to(self.device)
        parent, _, leaf = path.rpartition(".")
        setattr(self.tree.get_submodule(parent), leaf, swapped)

    def _place_other(self, name: str) -> None:
        """A tensor that is no linear: norms, biases, position tables; what the tree does not have is left out."""
        parameter = self.anatomy.parameters[name]
        if parameter_of(self.tree, parameter) is not None:
            value = self.checkpoint.read(name)
            check_finite(name, value)
            self._place(parameter, name, value.to(self.device, self.dtype))

    def _place(self, parameter: str, name: str, value: Tensor) -> None:
        current = parameter_of(self.tree, parameter)
        if current is None or current.shape != value.shape:
            expected = None if current is None else list(current.shape)
            raise CheckpointError(
                f"tensor {name!r} has shape {list(value.shape)}; the model has {parameter!r} of {expected}."
            )
        place_parameter(self.tree, parameter, value)

    def _tie(self) -> None:
        ties = dict(getattr(self.tree, "all_tied_weights_keys", None) or {})
        for target, source in ties.items():
            for empty, full in ((target, source), (source, target)):
                current, other = parameter_of(self.tree, empty), parameter_of(self.tree, full)
                if current is not None and current.is_meta and other is not None and not other.is_meta:
                    place_parameter(self.tree, empty, other)
