"""Principal directions of the residual stream: channels that hold most of it, found by turning it first.

Ashkboos et al.: SliceGPT, 2024, https://arxiv.org/abs/2401.15024. A model whose norms divide by a root mean square is
the same function in any orthogonal basis of its residual stream (`models/rotated.py`). In the basis of the eigenvectors
of

    C = Σ over norms Σ over tokens  n(x)ᵀ·n(x)          n(x): what a norm gives out, before its weight

the last channels hold the least of what the norms read, and are cut as any channels are (`widths.py`).

Differs from the paper: it gives every block a basis of its own and puts Qᵀ·Q' into the residual connections between
them, which no configuration of transformers can say. Here one basis serves all blocks, so that the result is an
ordinary model. The final norm's weight goes into the head: a tied head becomes a matrix of its own, which costs
parameters.

Cost: one pass of the text; one eigendecomposition of [hidden, hidden].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fettle.methods.reshape.subject import Subject
from fettle.methods.statistics import STATISTICS
from fettle.models.anatomy import read_anatomy
from fettle.models.rotated import rotate
from fettle.models.tap import Tap


@dataclass(frozen=True, eq=False)
class Principal:
    """A basis of the residual stream, and how much of it each direction holds.

    Attributes:
        directions: float64 [hidden, hidden], one a column, the largest first.
        energies: float64 [hidden], descending.
    """

    directions: Tensor
    energies: Tensor

    def apply(self, rows: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`rows` [..., hidden] · diag(scale) in the basis, in `dtype` or the rows' own; as `Orthogonal.apply`."""
        wide = rows.double() if scale is None else rows.double() * scale.double()
        return (wide @ self.directions).to(dtype or rows.dtype)

    def residual_map(self, width: int, *, centred: bool) -> Principal | None:
        """Itself: what `rotate` asks for."""
        return self

    def head_map(self, head_dim: int, block: int) -> None:
        """Heads stay as they are."""

    def kept(self, width: int) -> float:
        """The share of the stream that the first `width` directions hold."""
        return float(self.energies[:width].sum() / self.energies.sum())


def turned(subject: Subject, basis: Principal) -> Subject:
    """The subject with its residual stream in this basis: the same function.

    Raises:
        RecipeError: a model whose residual stream cannot be turned.
    """
    view = rotate(subject.checkpoint, subject.anatomy, basis)
    return replace(subject, checkpoint=view, anatomy=read_anatomy(view))


def principal_directions(subject: Subject) -> Principal:
    """The basis from the subject's windows."""
    assert subject.anatomy.embedding is not None
    kind = STATISTICS["gram"]
    state = kind.start(subject.anatomy.embedding.shape[1])
    skeleton, hidden = subject.skeleton()
    for index, block in enumerate(subject.anatomy.blocks):
        skeleton.load_block(index)

        def one(hidden_state: Tensor, index: int = index) -> tuple[Tensor, dict[str, Tensor]]:
            tap = Tap()
            return skeleton.run_block(index, hidden_state, tap), {group: x.cpu() for group, x in tap.inputs.items()}

        ran = subject.workers.map(one, hidden)
        hidden = [found for found, _ in ran]
        readers = {x.norm: x.input_group for x in block.linears if x.norm is not None and x.expert is None}
        for norm, group in sorted(readers.items()):
            weight = subject.checkpoint.read(f"{norm}.weight").float()
            inverse = torch.where(weight == 0, 0.0, 1 / weight)
            kind.add_(state, [taken[group] * inverse for _, taken in ran if group in taken], subject.workers)
        skeleton.free_block(index)
    gram = kind.finish(state).double()
    energies, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)  # which way a direction points is nobody's choice
    return Principal(directions=vectors.contiguous(), energies=energies.flip(0).clamp(min=0))
