"""What each matrix of a block reads, caught while the block runs.

What: inside `with tap:` every product is seen on its way to torch (`products.py`), its weight recognised by address
among the block's slots, and its input kept under the slot's `input_group`. Matrices that read the same activations
share a group, which is stored once. An expert's group holds only the tokens that the router sent it; an expert that saw
none has no entry.

Cost: no copy; the activations live as long as the tap.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fettle.models.products import Product, ProductMode


class Enough(Exception):
    """Everything that a tap was made for has been seen."""


class Tap(ProductMode):
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

    def multiplied(self, product: Product) -> Tensor:
        """Keeps what is read, if it is watched."""
        group = self._groups.get(product.address)
        if group is not None and (self._only is None or group in self._only):
            self.inputs[group] = _tokens(product.read)
            if self._only is not None and len(self.inputs) == len(self._only):
                raise Enough
        return product.run(product.read)


class ProductTap(Tap):
    """A tap that also keeps what the products gave, with their graph: `products` is address → (inputs [tokens, in],
    output [..., out]).

    For gradients with respect to a linear's outputs; a bias is added inside the product or after it, which changes no
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[int, tuple[Tensor, Tensor]] = {}

    def multiplied(self, product: Product) -> Tensor:
        """Keeps what is read and what comes out, if it is watched."""
        output = product.run(product.read)
        if product.address in self._groups:
            self.products[product.address] = (_tokens(product.read), output)
        return output


def _tokens(read: Tensor) -> Tensor:
    """[..., in] → [tokens, in], without its graph."""
    return read.detach().reshape(-1, read.shape[-1])
