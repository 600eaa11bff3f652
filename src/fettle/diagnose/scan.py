"""One block after another: what every candidate makes of every linear, on the original's own inputs.

    for each block: load → statistics from the calibration windows → every candidate of every linear → hand it over

`scan` is a generator: who iterates does with each block what it came for (measure, estimate, store) while the block is
loaded, so this loop knows nothing of either. Linears are compressed alone, one candidate beside another, on inputs that
no compressed block has touched: what one linear costs must not depend on what the others get. A method that asks for
the drift gets none, as there is none.

Memory: one block in float32, its statistics, and its codes in every candidate, a byte a weight each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fettle.data.windows import Windows
from fettle.diagnose.candidates import Candidate
from fettle.diagnose.estimates import Activations
from fettle.diagnose.original import Original, States
from fettle.errors import NonFiniteError
from fettle.methods.statistics import FEWEST_TOKENS, STATISTICS
from fettle.models.anatomy import Linear
from fettle.models.checkpoint import check_finite
from fettle.tensors.weights import CompressedWeight


@dataclass(frozen=True, kw_only=True)
class ScannedLinear:
    """One linear of a loaded block with everything that was found out about it."""

    linear: Linear
    weight: Tensor  # float32 [out, in], a copy
    seen: Activations
    quantized: dict[str, CompressedWeight]  # by the candidate's label


def linears_of(original: Original, index: int) -> list[Linear]:
    """The linears of a block that are compressed: all but routers."""
    return [linear for linear in original.anatomy.blocks[index].linears if linear.role != "router"]


def scan(
    original: Original, calibration: Windows | None, candidates: Sequence[Candidate], *, skip: Sequence[int] = ()
) -> Iterator[tuple[int, list[ScannedLinear]]]:
    """Every block's index and its linears; the block is loaded until the next one is asked for.

    Args:
        original: see there.
        calibration: the text for the candidates' statistics; None where none wants any.
        candidates: what every linear is compressed with.
        skip: blocks that are known already: the calibration only passes through them.

    Raises:
        NonFiniteError: a weight or a statistic is NaN or infinite.
    """
    kinds = statistics_of(candidates)
    hidden = original.embed(calibration) if kinds and calibration is not None else []
    for index in range(original.block_count):
        original.load(index)
        if index not in skip:
            linears = linears_of(original, index)
            statistics = collect(original, index, hidden, kinds)
            yield index, _compress(original, index, linears, statistics, candidates)
        if hidden:
            hidden = original.run(index, hidden)
        original.free(index)


def statistics_of(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """What the candidates' methods want to know of the inputs, the drift left out."""
    wanted = {kind for candidate in candidates for kind in candidate.method.needs()}
    return tuple(sorted(kind for kind in wanted if not STATISTICS[kind].paired))


def collect(original: Original, index: int, hidden: States, kinds: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The statistics of every input group of a loaded block, from the windows that enter it."""
    if not kinds:
        return {}
    widths = {linear.input_group: linear.shape[1] for linear in linears_of(original, index)}
    states = {(group, kind): STATISTICS[kind].start(width) for group, width in widths.items() for kind in kinds}
    tokens = dict.fromkeys(widths, 0)
    workers, skeleton = original.workers, original.skeleton
    batch = max(1, workers.threads)  # bounds the inputs that are held at once
    for first in range(0, len(hidden), batch):
        wanted = frozenset(widths)
        seen = workers.map(lambda state: skeleton.inputs_of(index, state, wanted), hidden[first : first + batch])  # noqa: B023
        for group in widths:
            inputs = [taken[group] for taken in seen if group in taken]
            tokens[group] += sum(len(window) for window in inputs)
            for kind in kinds if inputs else ():
                STATISTICS[kind].add_(states[group, kind], inputs, workers)
    found: dict[str, dict[str, Tensor]] = {}
    for group, width in widths.items():
        few = tokens[group] < FEWEST_TOKENS * width
        found[group] = {
            kind: STATISTICS[kind].neutral(width) if few else STATISTICS[kind].finish(states[group, kind])
            for kind in kinds
        }
    return found


def _compress(
    original: Original,
    index: int,
    linears: Sequence[Linear],
    statistics: dict[str, dict[str, Tensor]],
    candidates: Sequence[Candidate],
) -> list[ScannedLinear]:
    dtype = str(original.checkpoint.dtype).removeprefix("torch.")
    weights = {linear.name: original.skeleton.weight(linear).cpu() for linear in linears}
    for linear in linears:
        check_finite(linear.weight_name, weights[linear.name])

    def solve(piece: tuple[Linear, Candidate]) -> CompressedWeight:
        linear, candidate = piece
        try:
            return candidate.method.compress(weights[linear.name], statistics.get(linear.input_group, {}), dtype=dtype)
        except NonFiniteError as found:
            raise NonFiniteError(f"{linear.weight_name}: {found}") from found

    pieces = [(linear, candidate) for linear in linears for candidate in candidates]
    solved = original.workers.map(solve, pieces)
    made: dict[str, dict[str, CompressedWeight]] = {linear.name: {} for linear in linears}
    for (linear, candidate), quantized in zip(pieces, solved, strict=True):
        made[linear.name][candidate.label] = quantized
    with torch.no_grad():
        seen = original.activations(index)
    return [ScannedLinear(linear=x, weight=weights[x.name], seen=seen[x.name], quantized=made[x.name]) for x in linears]
