"""Which function multiplies: one table of op × format × device, one look-up, and a sentence that says the choice.

A faster kernel adds its row to `KERNELS` in front of the reference; nobody else chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from fettle.errors import UsageError, unknown_word
from fettle.kernels.masked import masked_linear
from fettle.kernels.reference import reference_linear
from fettle.kernels.vectors import vector_linear
from fettle.tensors.storages import Storage

REFERENCE = "reference (dequantize by tiles)"
# inputs, state, scheme, bias; the scheme is of the type that the format says
Linear = Callable[[Tensor, Mapping[str, Tensor], Any, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to run an op.

    Attributes:
        op: "linear".
        format: the storage that it reads; "vector-codes" for codes of eight weights.
        devices: torch device types, or empty for any.
        name: for people.
        run: inputs, state, scheme, bias → outputs.
    """

    op: str
    format: str
    devices: tuple[str, ...]
    name: str
    run: Linear


KERNELS: tuple[Kernel, ...] = (  # the first that fits runs
    *(
        Kernel(op="linear", format=storage, devices=(), name=REFERENCE, run=reference_linear(storage))
        for storage in get_args(Storage)
    ),
    Kernel(op="linear", format="vector-codes", devices=(), name=REFERENCE, run=vector_linear),
    Kernel(op="linear", format="masked", devices=(), name="reference (dense by tiles)", run=masked_linear),
)


def find(op: str, format: str, device: str) -> Kernel:
    """The kernel for an op on tensors of a storage format on a device type.

    Raises:
        UsageError: there is none; names what there is.
    """
    for kernel in KERNELS:
        if kernel.op == op and kernel.format == format and (not kernel.devices or device in kernel.devices):
            return kernel
    known = {f"{kernel.op} × {kernel.format}" for kernel in KERNELS}
    raise UsageError(f"{unknown_word('kernel', f'{op} × {format}', known)}; the device was {device}")


def explain(op: str, format: str, device: str) -> str:
    """One sentence: which kernel runs, and for what."""
    kernel = find(op, format, device)
    return f"{op} on {format} codes on {device} runs the {kernel.name} kernel"
