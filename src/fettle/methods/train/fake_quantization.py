"""Fake quantization: a linear that computes with the values of codes, and whose weights and scales learn.

    forward    values = dequantize(nearest codes of w / s) · s        the file's own arithmetic (`tensors/quantized.py`)
    backward   ∂/∂w = ∂/∂values       inside the range of the levels, 0 beyond (straight through, Bengio et al. 2013)
               ∂/∂s = Σ ∂/∂values · (q - u)   inside, q beyond        LSQ, https://arxiv.org/abs/1902.08153, equation 3

u = w / s, q its level. Scales are s = start · e^t and t learns, so that no scale changes its sign and a step counts the
same in every layer; LSQ's factor 1 / √(n · levels) is left out, since Adam's step has no size of its own. A scale is
rounded to the type in which it is stored before it is used, zero points stay as they started.

Two rules for s:

    learned   as above, from 2 to 8 bits, any grid of fixed levels
    mean      s = mean |w| of all that share it, anew in every step; the gradient passes as if nothing had been rounded:
              ternary in BitNet b1.58's way (https://arxiv.org/abs/2402.17764, equations 1 to 3, with granularity:
              tensor) and binary in XNOR-Net's (https://arxiv.org/abs/1603.05279)

Inputs are rounded by the same `InputQuantizer` that a loaded model runs, straight through as well; where their scale is
stored, it learns, too (`fake_inputs.py`). What is exported is
`quantized()`: the codes of the last forward pass, so the written file decodes to exactly the weights that were used.

Cost: one rounding of every weight a step; memory the weight twice.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fettle.errors import RecipeError
from fettle.methods.quantize.ranges import in_groups, stored_scale
from fettle.methods.train.fake_inputs import LearnedInputs
from fettle.tensors.activations import InputQuantizer, InputScale
from fettle.tensors.quantized import QuantizedTensor, dequantize_rows, expand_groups, quantize_rows
from fettle.tensors.scales import Shared
from fettle.tensors.scheme import Scheme
from fettle.tensors.weights import CompressedWeight

Code_co = TypeVar("Code_co", bound=CompressedWeight, covariant=True)
ScaleRule = Literal["learned", "mean"]
LEAN = 0.49  # of the gap to the next level: how far from the start's level a weight may begin


class _Nearest(torch.autograd.Function):
    """Weight and scale → the values of the nearest codes; gradients as the module says."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor | None, shared: Shared, scheme: Scheme) -> Tensor:
        values = dequantize_rows(quantize_rows(weight, shared, scheme), shared, scheme).float()
        ctx.scheme, ctx.zero_point = scheme, shared.zero_point
        ctx.save_for_backward(weight, shared.scale.float(), values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient = gradients[0]
        if not ctx.needs_input_grad[1]:  # the scale follows from the weight: as if nothing had been rounded
            return gradient, None, None, None
        weight, scale, values = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        width = scheme.group_width(weight.shape[1])
        units = weight / expand_groups(scale, weight.shape[1], width)
        low, high = _ends(scheme, ctx.zero_point, weight.shape[1])
        inside = (units >= low) & (units <= high)
        pull = gradient * torch.where(inside, values - weight, values)  # ∂/∂t, as s · (q - u) = values - w
        return gradient * inside, _shared_sums(pull, scheme, (scale.shape[0], scale.shape[1])), None, None


def _ends(scheme: Scheme, zero_point: Tensor | None, in_features: int) -> tuple[Tensor, Tensor]:
    """Half a gap beyond the lowest and the highest level, in units of the scale: where clipping begins."""
    levels = scheme.grid.levels
    low, high = torch.tensor(levels[0]), torch.tensor(levels[-1])
    if zero_point is not None:
        low = -expand_groups(zero_point.float(), in_features, scheme.group_width(in_features))
        high = low + (2**scheme.grid.bits - 1)
    return low - (levels[1] - levels[0]) / 2, high + (levels[-1] - levels[-2]) / 2


def _shared_sums(values: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Sums over the weights that share a scale: [out, in] → [rows, groups]."""
    if scheme.granularity == "tensor":
        return values.sum().reshape(1, 1)
    width = scheme.group_width(values.shape[1])
    return pad(values, (0, shape[1] * width - values.shape[1])).reshape(*shape, width).sum(-1)


class FakeLinear(nn.Module, Generic[Code_co]):
    """Takes the place of an `nn.Linear`; computes what the exported codes will.

    Attributes:
        weight: float32 [out, in], the latent weights, which learn.
        log_scale: float32 [rows, groups], the logarithm of what each scale is multiplied by; None where none learns.
        bias: of the linear that it replaces; None without.
        inputs: what rounds the inputs where their scale is stored, and learns; None where not.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.log_scale: nn.Parameter | None = None
        self.inputs: LearnedInputs | None = None
        self._quantizer: InputQuantizer | None = None

    @abstractmethod
    def values(self) -> Tensor:
        """The weight that is computed with, float32 [out, in], with its straight-through gradients."""

    @property
    @abstractmethod
    def level_gap(self) -> float:
        """How far neighbouring values of a weight are apart, on average."""

    @abstractmethod
    def quantized(self) -> Code_co:
        """The codes and scales of `values`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        rounded = self.inputs or self._quantizer
        read = inputs if rounded is None else rounded(inputs)
        return linear(read, self.values().to(read.dtype), self.bias)


class FakeQuantizedLinear(FakeLinear[QuantizedTensor]):
    """One code for each weight; `scheme` is what the codes mean."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scheme: Scheme, rule: ScaleRule, start: Shared | None = None,
        inputs: InputScale | None = None,
    ) -> None:  # fmt: skip
        """`start` holds the first scales and the zero points; the rule "mean" needs none.

        `inputs` is the first scale of the inputs, where the scheme stores one.
        """
        super().__init__(weight, bias)
        check_scheme(scheme, rule)
        self.scheme, self.rule = scheme, rule
        learned = start if rule == "learned" else None
        for name, value in (
            ("_base", None if learned is None else learned.scale.float()),
            ("_zero_point", None if learned is None else learned.zero_point),
        ):
            self.register_buffer(name, value, persistent=False)  # where the weights go, they go
        self._base: Tensor | None
        self._zero_point: Tensor | None
        if self._base is not None:
            self.log_scale = nn.Parameter(torch.zeros_like(self._base))
        if scheme.activations is not None:
            self._quantizer = InputQuantizer(activations=scheme.activations)
        if scheme.has_input_scale:
            assert scheme.activations is not None and inputs is not None
            self.inputs = LearnedInputs(scheme.activations, inputs)

    @property
    def shared(self) -> Shared:
        """Scales and zero points as they are stored now."""
        if self.log_scale is None or self._base is None:
            return Shared(scale=mean_scale(self.weight.detach(), self.scheme))
        scale = stored_scale(self._base * self.log_scale.detach().exp(), self.scheme)
        return Shared(scale=scale, zero_point=self._zero_point)

    @property
    def level_gap(self) -> float:
        """How far neighbouring values of a weight are apart, on average."""
        levels = self.scheme.grid.levels
        return float(self.shared.scale.float().mean()) * (levels[-1] - levels[0]) / (len(levels) - 1)

    def values(self) -> Tensor:
        """The weight that is computed with, float32 [out, in]; gradients as the module says."""
        found: Tensor = _Nearest.apply(self.weight, self.log_scale, self.shared, self.scheme)  # type: ignore[no-untyped-call]
        return found

    def quantized(self) -> QuantizedTensor:
        """The codes and scales of `values`."""
        shared = self.shared
        found = QuantizedTensor.of(quantize_rows(self.weight.detach(), shared, self.scheme), shared, self.scheme)
        return found if self.inputs is None else replace(found, input_scale=self.inputs.stored())


def check_scheme(scheme: Scheme, rule: ScaleRule) -> None:
    """Raises RecipeError for a scheme that this cannot train."""
    if scheme.grid.is_learned:
        raise RecipeError("qat moves weights and scales, and learned levels have no scale; use another grid")
    if scheme.remainder is not None or scheme.has_tensor_scale:
        raise RecipeError(f"qat trains codes and their scales alone; {scheme.describe()} has more than that")
    if rule == "mean" and scheme.zero_point:
        raise RecipeError("the scale mean |w| has no zero point; use asymmetric: false or scale_rule: learned")
    if scheme.activations is not None and scheme.activations.granularity == "tensor_group":
        raise RecipeError(
            "activation_granularity: tensor_group is the NV format's, whose stored number is a unit of scales that are "
            "found on the spot, and nothing in it can learn; allowed: tensor, token, group"
        )


def mean_scale(weight: Tensor, scheme: Scheme) -> Tensor:
    """Mean |w| of all that share a scale, as it is stored: `value_dtype` [rows, groups] for [out, in]."""
    groups = in_groups(weight.abs(), scheme)
    counts = in_groups(torch.ones_like(weight), scheme).sum(-1)
    return stored_scale(groups.sum(-1) / counts, scheme)


def leaning_start(start: QuantizedTensor, original: Tensor | None) -> Tensor:
    """Latent weights [out, in] whose nearest codes are the start's, leaning to where the original weight lies."""
    if original is None:
        return start.dequantize()
    scheme, in_features = start.scheme, start.shape[1]
    width = scheme.group_width(in_features)
    # in units of the scale, where a level is exact: a value was rounded to the scale's type
    level = scheme.grid.table(device=start.codes.device)[start.codes.int()]
    if start.zero_point is not None:
        level = level - scheme.grid.levels[0] - expand_groups(start.zero_point.float(), in_features, width)
    scale = expand_groups(start.scale.float(), in_features, width)
    reach = LEAN * min(b - a for a, b in zip(scheme.grid.levels, scheme.grid.levels[1:], strict=False))
    return (level + (original / scale - level).clamp(-reach, reach)) * scale
