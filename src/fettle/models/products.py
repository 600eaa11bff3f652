"""Being told of every product of a block on its way to torch, with what it reads and by which weight.

What: inside `with mode:` every `torch.nn.functional.linear` and `torch.addmm` (GPT-2's Conv1D) comes by.

Why not forward hooks: transformers 5 keeps experts as slices of one 3-D parameter, which are no modules, so no hook
sees them; and hooks are global state on a module, so two threads that run one block on two windows would mix their
inputs. A `TorchFunctionMode` is local to its thread. Weights are known by their address (`Tensor.data_ptr()`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: the intercepted functions → (position and keyword of input and weight)
PRODUCTS: dict[Callable[..., Any], tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One call.

    Attributes:
        read: the activations [..., in].
        address: of the weight.
        run: computes the product, of `read` or of what is given in its place.
    """

    read: Tensor
    address: int
    run: Callable[[Tensor], Tensor]


class ProductMode(TorchFunctionMode):
    """Calls `multiplied` in place of each product."""

    @abstractmethod
    def multiplied(self, product: Product) -> Tensor:
        """What takes the product's place, [..., out]."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        places = PRODUCTS.get(func)
        if places is None:
            return func(*args, **given)
        (read_at, read_as), (weight_at, weight_as) = places
        weight = args[weight_at] if len(args) > weight_at else given[weight_as]

        def run(read: Tensor) -> Tensor:
            if len(args) > read_at:
                found: Tensor = func(*args[:read_at], read, *args[read_at + 1 :], **given)
            else:
                found = func(*args, **{**given, read_as: read})
            return found

        read = args[read_at] if len(args) > read_at else given[read_as]
        return self.multiplied(Product(read=read, address=weight.data_ptr(), run=run))
