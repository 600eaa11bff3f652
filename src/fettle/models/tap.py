"""What each matrix of a block reads, caught while the block runs.

What: inside `with tap:` every `torch.nn.functional.linear` and `torch.addmm` (GPT-2's Conv1D) is seen on its way to
torch, its weight recognised by address among the block's slots, and its input kept under the slot's `input_group`.

Why not forward hooks: transformers 5 keeps experts as slices of one 3-D parameter, which are no modules, so no hook
sees them; and hooks are global state on a module, so two threads that run one block on two windows would mix their
inputs. A `TorchFunctionMode` is local to its thread. Matrices that read the same activations share a group, which is
stored once. An expert's group holds only the tokens that the router sent it; an expert that saw none has no entry.

Cost: no copy; the activations live as long as the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: the intercepted functions → (position and keyword of input and weight)
PRODUCTS: dict[Callable[..., Any], tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
}


class Enough(Exception):
    """Everything that a tap was made for has been seen."""


class Tap(TorchFunctionMode):
    """`inputs`: input_group → activations [tokens, in] of the last block that ran under it. Use one tap per thread.

    With `only`, it keeps these groups alone, and raises `Enough` in front of the product that reads the last of them.
    """

    def __init__(self, only: frozenset[str] | None = None) -> None:
        super().__init__()
        self.inputs: dict[str, Tensor] = {}
        self._only = only
        self._groups: Mapping[int, str] = {}

    def watch(self, groups: Mapping[int, str]) -> Tap:
        """Forgets what it has and recognises weights by these addresses (`Tensor.data_ptr()`) from now on."""
        self.inputs, self._groups = {}, groups
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        places = PRODUCTS.get(func)
        if places is not None:
            (read_at, read_as), (weight_at, weight_as) = places
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_as)
            group = self._groups.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
            if group is not None and (self._only is None or group in self._only):
                read = args[read_at] if len(args) > read_at else kwargs[read_as]
                self.inputs[group] = read.detach().reshape(-1, read.shape[-1])  # [tokens, in]
                if self._only is not None and len(self.inputs) == len(self._only):
                    raise Enough
        return func(*args, **kwargs)


class ProductTap(Tap):
    """A tap that also keeps what the products gave, with their graph: `products` is address → (inputs [tokens, in],
    output [..., out]).

    For gradients with respect to a linear's outputs; a bias is added inside the product or after it, which changes no
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        places = PRODUCTS.get(func)
        if places is not None:
            (read_at, read_as), (weight_at, weight_as) = places
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_as)
            if isinstance(weight, Tensor) and weight.data_ptr() in self._groups:
                read = args[read_at] if len(args) > read_at else kwargs[read_as]
                self.products[weight.data_ptr()] = (read.detach().reshape(-1, read.shape[-1]), output)
        return output
