"""What the methods with a score share: rounds of scoring, pruning and healing, then values or codes for what stayed.

for each round   scores of the weight as it is → the least go → what stayed is healed under the gram
at last          plain values; or the nearest codes of what stayed, their ranges searched without what went
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fettle.errors import NonFiniteError
from fettle.methods.prune.fields import PruneFields
from fettle.methods.prune.healing import least_squares
from fettle.methods.prune.schedule import prune_in_rounds, sparsities
from fettle.methods.prune.selection import kept_by_score, on_the_way
from fettle.methods.quantize.ranges import NOT_FINITE
from fettle.methods.quantize.round_to_nearest import round_to_nearest
from fettle.tensors.masked import MaskedScheme, MaskedTensor

DAMPING = 0.01  # of the gram's mean diagonal, as GPTQ's
Pruned = tuple[Tensor, Tensor]  # weight [out, in], what stays of it


def prune_by(
    weight: Tensor,
    scores: Callable[[Tensor], Tensor],
    fields: PruneFields,
    statistics: Mapping[str, Tensor],
    *,
    dtype: str,
) -> MaskedTensor:
    """Weight [out, in] with the least of `scores` gone; pure.

    Args:
        weight: any floating type; untouched.
        scores: a weight [out, in] → what losing each weight costs, [out, in].
        fields: pattern, sparsity, rounds, healing, codes.
        statistics: "gram" where `fields` heals.
        dtype: the model's own.

    Raises:
        NonFiniteError: NaN or infinity in the weight or a statistic, or a value beyond its type.
    """
    check_weight(weight)
    scheme = fields.scheme(dtype)
    pattern, target = scheme.shape_of_mask, weight.float()
    gram = statistics.get("gram") if fields.heal == "least_squares" else None
    damping = 0.0 if gram is None else mean_damping(gram, DAMPING)

    def prune(state: Pruned, sparsity: float) -> Pruned:
        found = scores(state[0])
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(
                "what the methods knows of this linear's inputs holds NaN or infinity; check the block"
            )
        kept = kept_by_score(found, on_the_way(pattern, sparsity), sparsity)
        return state[0] * kept, kept

    def heal(state: Pruned) -> Pruned:
        if gram is None:
            return state
        return least_squares(target, *state, gram, damping=damping), state[1]

    steps = sparsities(scheme.sparsity, fields.rounds, fields.schedule)
    changed, kept = prune_in_rounds((target, torch.ones_like(target, dtype=torch.bool)), steps, prune, heal)
    return stored(changed, kept, scheme)


def stored(weight: Tensor, kept: Tensor, scheme: MaskedScheme) -> MaskedTensor:
    """Values of weight [out, in] where `kept`, as the scheme stores them: as they are, or the nearest codes.

    Raises:
        NonFiniteError: a value beyond its type.
    """
    if scheme.values is not None:
        return MaskedTensor.of_codes(round_to_nearest(weight * kept, scheme.values, clip="search"), kept, scheme)
    found = MaskedTensor.of(weight, kept, scheme)
    assert isinstance(found.values, Tensor)
    if not bool(torch.isfinite(found.values).all()):
        raise NonFiniteError(f"a weight of {float(weight.abs().max()):.3g} is beyond {scheme.value_dtype}")
    return found


def check_weight(weight: Tensor) -> None:
    """Raises NonFiniteError for NaN or infinity in a weight."""
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(NOT_FINITE)


def mean_damping(gram: Tensor, damping: float) -> float:
    """`damping` times the mean of the diagonal; 1 without any inputs."""
    mean = float(gram.diagonal().double().mean())
    return damping * mean if mean > 0 else 1.0
