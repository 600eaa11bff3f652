"""Adapters on a pruned base: merged inside its mask, which would otherwise fill up with what B A puts everywhere.

    W' = M ⊙ (W + (α / r) · B A)        M the mask of a pruned matrix, and W zero outside of it

A product of two thin matrices has no zeros, so that merging alone makes a pruned model dense again. What falls outside
of the mask is lost; a training that is going to merge therefore computes with W' from its first step on, so that it
learns what will be there. DoRA's norm is that of W + (α / r) · B A, whole, as PEFT merges it. IA3 multiplies, and zeros
stay zeros. An adapter that was trained to stand beside its base, and is merged later, loses what it had outside.

Masks come from what is stored as such (`tensors/masked.py`); zeros of dense matrices count where `keep_zeros` says so.
A matrix that was stored with a mask is written with it, in plain values of the model's type, also where its own were
codes.

Cost: for each such matrix the product B A and one dense product of the inputs more, in every pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fettle.methods.train.adapter_targets import module_path
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel
from fettle.models.module_tree import parameter_of, part_of
from fettle.models.parts import Linear
from fettle.models.storage import read_quantized, stored_schemes
from fettle.tensors.masked import MaskedScheme, MaskedTensor
from fettle.tensors.scheme import SCALE_DTYPES


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Of one matrix.

    Attributes:
        linear: whose.
        kept: bool [out, in].
        scheme: how the merged one is stored; None where it is dense.
    """

    linear: Linear
    kept: Tensor
    scheme: MaskedScheme | None


def stored_masks(loaded: LoadedModel, *, keep_zeros: bool) -> dict[str, Mask]:
    """Linear's name → its mask, of the pruned ones; with `keep_zeros` dense ones with zeros count as well."""
    checkpoint = Checkpoint.open(loaded.folder)
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    schemes = stored_schemes(checkpoint, loaded.anatomy)
    found: dict[str, Mask] = {}
    for item in (*loaded.anatomy.linears(), *([loaded.anatomy.head] if loaded.anatomy.head else [])):
        stored = schemes.get(item.name)
        if stored is not None and isinstance(stored.scheme, MaskedScheme):
            weight = read_quantized(checkpoint, item, stored)
            assert isinstance(weight, MaskedTensor)
            plain = replace(stored.scheme, values=None, value_dtype=dtype if dtype in SCALE_DTYPES else "float32")
            found[item.name] = Mask(linear=item, kept=weight.kept, scheme=plain)
        elif stored is None and keep_zeros:
            held = parameter_of(loaded.model, item.slot.parameter)
            kept = None if held is None else part_of(held.detach(), item) != 0
            if kept is not None and not bool(kept.all()):
                found[item.name] = Mask(linear=item, kept=kept.cpu(), scheme=None)
    return found


def inside_masks_(model: Any, masks: Mapping[str, Mask]) -> None:
    """PEFT's LoRA layers on masked matrices compute, from here on, with what will be merged."""
    for mask in masks.values():
        if mask.linear.slot.index is not None:  # an expert inside of a parameter, where no adapter is
            continue
        layer = model.get_submodule(f"base_model.model.{module_path(mask.linear)}")
        if "default" in getattr(layer, "lora_A", {}):
            layer.register_buffer("kept", mask.kept.to(layer.lora_A["default"].weight.device), persistent=False)
            layer.forward = partial(_masked_forward, layer, mask.linear.slot.transposed)


def masked_(tree: nn.Module, anatomy: Anatomy, masks: Mapping[str, Mask]) -> dict[str, MaskedTensor]:
    """Sets the merged weights to zero outside of the masks; those that are stored with one, by name."""
    codes: dict[str, MaskedTensor] = {}
    for name, mask in masks.items():
        held = parameter_of(tree, mask.linear.slot.parameter)
        assert held is not None, mask.linear.slot
        weight = part_of(held.detach(), anatomy.find(name))
        weight.masked_fill_(~mask.kept.to(weight.device), 0.0)
        if mask.scheme is not None:
            codes[name] = MaskedTensor.of(weight.cpu(), mask.kept, mask.scheme)
    return codes


def _masked_forward(layer: Any, transposed: bool, inputs: Tensor, *rest: Any, **named: Any) -> Tensor:
    """[..., in] → [..., out], with M ⊙ B A in place of B A."""
    if layer.disable_adapters or layer.merged:
        found: Tensor = type(layer).forward(layer, inputs, *rest, **named)
        return found
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    added = layer.scaling["default"] * (second @ first)
    result: Tensor = layer.base_layer(inputs, *rest, **named)
    dropped = layer.lora_dropout["default"](inputs.to(first.dtype))
    change = linear(dropped, added * layer.kept)
    if "default" not in layer.lora_variant:
        return result + change.to(result.dtype)
    weight = layer.base_layer.weight.float()
    whole = (weight.T if transposed else weight) + added.detach().float()
    factor = layer.lora_magnitude_vector["default"].weight / torch.linalg.norm(whole, dim=1)
    bias = layer.base_layer.bias
    plain = result if bias is None else result - bias
    changed: Tensor = (factor - 1) * plain + factor * change
    return result + changed.to(result.dtype)
