"""A transformers module tree on the meta device, and putting parameters into it.

What: `build_tree` asks transformers for the class that `config.json` names, with every parameter on meta (a shape
without memory) and every buffer real: rotary frequencies and causal masks are computed by the model's own constructor.

Two settings make the tree run the same sums everywhere: attention is `sdpa` where the architecture has it, unless it
caps its scores (sdpa cannot, so `eager`), and experts run as the plain loop over experts, so that each expert's
product is an ordinary `linear` on its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fettle.errors import ModelError
from fettle.models.anatomy import Anatomy
from fettle.models.block_widths import WIDTHS_KEY, fit_tree
from fettle.models.checkpoint import Checkpoint
from fettle.models.parts import Linear

#: what transformers raises for a config.json that cannot be; torch's layers assert
_BAD_CONFIG = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)


def build_tree(checkpoint: Checkpoint, anatomy: Anatomy, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """The model of `checkpoint.config` in evaluation mode; parameters on meta, buffers on `device`.

    Raises `ModelError` when this transformers has no such architecture.
    """
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from huggingface_hub.errors import StrictDataclassError

    fields = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        config = transformers.AutoConfig.for_model(**fields)
        capped = getattr(config, "attn_logit_softcapping", None)
        model_class = _model_class(transformers, checkpoint, anatomy)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = model_class._from_config(
                config, dtype=dtype, attn_implementation="eager" if capped else None, experts_implementation="eager"
            )
    except (*_BAD_CONFIG, StrictDataclassError) as error:
        raise ModelError(
            f"transformers {transformers.__version__} cannot build the model that config.json in {checkpoint.folder} "
            f"describes: {' '.join(str(error).split())}. Check that value there, model_type, architectures and the "
            "token ids, or install a transformers that knows them."
        ) from error
    if WIDTHS_KEY in checkpoint.config:
        fit_tree(model, anatomy)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            raise ModelError(f"buffer {name!r} of {type(model).__name__} could not be computed without weights.")
    if torch.device(device).type != "cpu":
        for module in model.modules():
            for key, held in module._buffers.items():
                module._buffers[key] = held if held is None else held.to(device)
    return model.eval().requires_grad_(False)


def _model_class(transformers: Any, checkpoint: Checkpoint, anatomy: Anatomy) -> Any:
    names = checkpoint.config.get("architectures") or []
    found = getattr(transformers, str(names[0]), None) if names else None
    if found is not None:
        return found
    config_class = type(transformers.AutoConfig.for_model(checkpoint.config["model_type"]))
    auto = transformers.AutoModelForCausalLM if anatomy.causal else transformers.AutoModel
    return auto._model_mapping[config_class]


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter called `name` (dotted) in `module`, or None."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    return owner._parameters.get(leaf)


def place_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Makes `value` the parameter `name` (dotted) of `module`, without a copy."""
    path, _, leaf = name.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    module.get_submodule(path)._parameters[leaf] = parameter


def release_parameters(module: nn.Module) -> None:
    """Moves every parameter of `module` back to meta; their memory is freed."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def part_of(view: Tensor, linear: Linear) -> Tensor:
    """Of something in the shape of a linear's parameter, the linear's own part, [out, in]."""
    if linear.slot.index is not None:
        view = view[linear.slot.index]
    if linear.slot.rows is not None:
        view = view[linear.slot.rows[0] : linear.slot.rows[1]]
    return view.T if linear.slot.transposed else view
