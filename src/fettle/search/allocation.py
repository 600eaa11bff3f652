"""allocate: how the share that a model loses is spread over its linears; out comes a recipe with a step for each.

    uniform      the same share everywhere: nothing to do
    global       one threshold for the scores of all linears: what is least anywhere goes first
    outliers     OWL, Yin et al. 2023, https://arxiv.org/abs/2310.05175: a block keeps the more, the larger the share
                 of its |w|·‖x‖ that is above 5 times their mean; at most 0.08 more or less than the target
    sensitivity  each linear pruned to five shares around the target, the KL of each estimated from one backward pass
                 (`diagnose/estimates.py`); then the cheapest weights of all go first, along the convex hull of each
                 linear's curve (exact for such curves)

Whatever spreads it, the whole loses round(sparsity · weights), to the weight with the pattern `layer`, to a row's or a
block's worth with the others. Only calibration text is looked at; statistics and gradients are the original's own.

An embedding or a head that the step names takes part: a tied one as one matrix, by what the head reads; a head's score
is compared with the others', and for OWL it counts as a block of its own. Nothing is known of the inputs of an
embedding that is no head, and no sensitivity is estimated outside the blocks: those lose the target share.

Cost: one forward and one backward pass over at most 4,096 tokens; one pass of scores, and for "sensitivity" five
compressions of every linear. "global" with magnitude reads the weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fettle.data.windows import Windows
from fettle.diagnose.candidates import Candidate
from fettle.diagnose.estimates import second_order
from fettle.diagnose.original import Original, States
from fettle.diagnose.scan import collect, linears_of, scan
from fettle.methods.protocols import MatrixMethod
from fettle.methods.prune.wanda import Wanda
from fettle.methods.statistics import STATISTICS
from fettle.models.anatomy import Anatomy, Linear
from fettle.models.storage import read_weight
from fettle.pipeline.loss_gradients import mean_gradient, refuse_without_gradient
from fettle.pipeline.recipe import Recipe, Step
from fettle.pipeline.run import Run, prepare
from fettle.pipeline.where import Where
from fettle.progress import Progress, Silent
from fettle.search.counts import Curve, cheapest_counts, settle
from fettle.tensors.masked import MaskedScheme

SAMPLE_TOKENS = 4096
OUTLIER_TIMES, OUTLIER_SPREAD = 5.0, 0.08  # M and λ of the paper
LEVELS = (-0.3, -0.15, 0.0, 0.15, 0.3)  # around the target
LARGEST_SHARE = 0.98
BINS = 1 << 16


class PruningMethod(MatrixMethod, Protocol):
    """A method that says what losing each weight costs."""

    sparsity: float | None
    pattern: str

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """float32 [out, in], not negative."""
        ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """A linear, how many of its weights can go at a time, and how many of them go."""

    linear: Linear
    unit: int
    count: int = 0

    @property
    def largest(self) -> int:
        """The most that may go."""
        return int(LARGEST_SHARE * self.linear.parameters) // self.unit * self.unit


def allocated(
    model: str | Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    generic: bool = False,
    progress: Progress | None = None,
) -> Recipe:
    """The recipe with a share of its own for every linear, where it asks for that; else the recipe.

    Raises:
        UsageError: a model without tokenizer or head where text is needed.
        ModelError: see `prepare`.
    """
    if recipe.allocation == "uniform":
        return recipe
    *before, step = recipe.steps  # what reshapes the model, and the one step that prunes
    method = cast(PruningMethod, step.method)
    probe = replace(recipe, allocation="uniform")
    if method.needs() or recipe.allocation != "global":  # the spread looks at text, whether the method does or not
        seeing = Wanda(sparsity=method.sparsity, pattern=method.pattern)
        probe = replace(probe, steps=(*before, replace(step, method=seeing)))
    run = prepare(model, probe, device=device, threads=threads, generic=generic)
    shares = [Share(linear=item.linear, unit=_unit(item.scheme, item.linear)) for item in run.layout.compressions]
    scheme = method.scheme("float32")
    assert isinstance(scheme, MaskedScheme)
    counts = _counts(run, method, shares, scheme.sparsity, recipe.allocation, progress or Silent())
    steps = tuple(
        Step(
            method=replace(cast(Any, method), sparsity=counts[share.linear.name] / share.linear.parameters),
            where=_where(share.linear, run.anatomy),
        )
        for share in shares
    )
    return replace(recipe, steps=(*before, *steps), allocation="uniform")


def _counts(
    run: Run, method: PruningMethod, shares: Sequence[Share], sparsity: float, allocation: str, progress: Progress
) -> dict[str, int]:
    """How many weights each linear loses, by its name; what nothing can be compared for loses the target share."""
    for share in shares:
        if "gradient" in method.needs():
            refuse_without_gradient(share.linear, run.anatomy, method.name)
    sees = allocation == "outliers" or bool(method.needs())
    free = [share for share in shares if _comparable(share.linear, run.anatomy, allocation, sees)]
    spread = {"global": _by_threshold, "outliers": _by_outliers, "sensitivity": _by_sensitivity}[allocation]
    counts = {x.linear.name: min(x.largest, round(sparsity * x.linear.parameters) // x.unit * x.unit) for x in shares}
    total = round(sparsity * sum(share.linear.parameters for share in free))
    with run.workers, torch.no_grad():
        found = spread(run, method, free, total, progress) if free else []
    return counts | {share.linear.name: count for share, count in zip(free, found, strict=True)}


def _comparable(linear: Linear, anatomy: Anatomy, allocation: str, sees: bool) -> bool:
    """Whether the allocation knows of this linear what it knows of the others."""
    if linear.block is not None:
        return True
    return allocation != "sensitivity" and (not sees or linear.role == "head" or anatomy.tied)


def _where(linear: Linear, anatomy: Anatomy) -> Where:
    """The step for one linear; a tied matrix is named from both sides, since both lose the weights."""
    if anatomy.tied and linear.block is None:
        return Where(role=("embedding", "head"))
    return Where(name=linear.name)


def _unit(scheme: object, linear: Linear) -> int:
    assert isinstance(scheme, MaskedScheme)
    pattern = scheme.shape_of_mask
    return linear.shape[0] if pattern.kind == "row" else pattern.rows * pattern.columns


def _by_threshold(
    run: Run, method: PruningMethod, shares: Sequence[Share], total: int, progress: Progress
) -> list[int]:
    """Counts of each linear's scores below one threshold: from histograms of the upper half of the scores' bits, whose
    order is the scores' own (bins 0.8% wide); within the last bin in proportion.
    """
    found = {}
    with progress.task("comparing scores", len(shares)) as task:
        for linear, weight, statistics in _weights(run, method.needs(), shares):
            scores = method.scores(weight, statistics).clamp(min=0).reshape(-1).contiguous()
            found[linear.name] = torch.bincount(scores.view(torch.int32) >> 15, minlength=BINS)
            task.advance()
    table = torch.stack([found[share.linear.name] for share in shares])  # [linears, bins]
    below = table.sum(0).cumsum(0)
    last = int(torch.searchsorted(below, total))
    before = table[:, :last].sum(1).double()
    rest, inside = total - float(before.sum()), table[:, last].double()
    wanted = before + inside * (rest / max(1.0, float(inside.sum())))
    return settle(wanted.tolist(), shares_of(shares), total)


def _by_outliers(run: Run, method: PruningMethod, shares: Sequence[Share], total: int, progress: Progress) -> list[int]:
    """OWL: the target, moved by how many outliers a block has."""
    sizes: dict[int | None, list[Tensor]] = {}
    with progress.task("counting outliers", len(shares)) as task:
        above: dict[int | None, float] = {}
        for linear, weight, statistics in _weights(run, ("squared_norm",), shares):
            sizes.setdefault(linear.block, []).append((weight.abs() * statistics["squared_norm"].sqrt()).reshape(-1))
            task.advance()
            if len(sizes[linear.block]) == sum(share.linear.block == linear.block for share in shares):
                together = torch.cat(sizes.pop(linear.block))
                above[linear.block] = float((together > OUTLIER_TIMES * together.mean()).double().mean())
    low, high = min(above.values()), max(above.values())
    moved = {b: (x - low) / (high - low) * 2 * OUTLIER_SPREAD if high > low else 0.0 for b, x in above.items()}
    weights = sum(share.linear.parameters for share in shares)
    mean = sum(moved[share.linear.block] * share.linear.parameters for share in shares) / weights
    wanted = [share.linear.parameters * (total / weights - moved[share.linear.block] + mean) for share in shares]
    return settle(wanted, shares_of(shares), total)


def _by_sensitivity(
    run: Run, method: PruningMethod, shares: Sequence[Share], total: int, progress: Progress
) -> list[int]:
    """What the estimates of the KL say about five shares of every linear."""
    target = total / sum(share.linear.parameters for share in shares)
    levels = sorted({min(max(target + level, 0.02), LARGEST_SHARE) for level in LEVELS})
    dtype = str(run.checkpoint.dtype).removeprefix("torch.")
    candidates = []
    for level in levels:
        changed = cast(MatrixMethod, replace(cast(Any, method), sparsity=level))
        candidates.append(Candidate(label=f"{level:g}", method=changed, scheme=changed.scheme(dtype)))
    names = {share.linear.name for share in shares}
    curves: dict[str, Curve] = {}
    original = _original(run)
    with progress.task("finding sensitivities", original.block_count) as task:
        for _, linears in scan(original, _sample(run), candidates):
            for found in linears:
                if found.linear.name in names:
                    pieces = [found.quantized[candidate.label].dequantize() - found.weight for candidate in candidates]
                    costs = run.workers.map(lambda piece: second_order(piece, found.seen)[0], pieces)  # noqa: B023
                    counts = [level * found.linear.parameters for level in levels]
                    curves[found.linear.name] = Curve(counts=(0.0, *counts), costs=(0.0, *costs))
            task.advance()
    wanted = cheapest_counts([curves[share.linear.name] for share in shares], total)
    return settle(wanted, shares_of(shares), total)


def shares_of(shares: Sequence[Share]) -> list[tuple[int, int]]:
    """(unit, largest count) of each."""
    return [(share.unit, share.largest) for share in shares]


def _weights(
    run: Run, kinds: Sequence[str], shares: Sequence[Share]
) -> Iterator[tuple[Linear, Tensor, Mapping[str, Tensor]]]:
    """Every linear with its weight and these statistics of its inputs; blocks are read one by one."""
    wanted = {share.linear.name for share in shares}
    if not kinds:
        for share in shares:
            yield share.linear, read_weight(run.checkpoint, share.linear), {}
        return
    original, windows = _original(run), _sample(run)
    known = tuple(sorted(kind for kind in kinds if kind != "drift" and kind != "gradient"))
    gradients = "gradient" in kinds
    hidden = original.embed(windows)
    for index in range(original.block_count):
        original.load(index)
        statistics = collect(original, index, hidden, known)
        seen = original.activations(index) if gradients else {}
        for linear in linears_of(original, index):
            if linear.name in wanted:
                own = {"gradient": mean_gradient(seen[linear.name])} if gradients else {}
                yield linear, original.skeleton.weight(linear).cpu(), statistics.get(linear.input_group, {}) | own
        hidden = original.run(index, hidden)
        original.free(index)
    for share in shares:
        if share.linear.block is None:
            yield share.linear, read_weight(run.checkpoint, share.linear), _of_the_head(original, hidden, known)


def _of_the_head(original: Original, hidden: States, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The statistics of what the head reads, and so of a tied matrix; from the last block's outputs."""
    inputs = [original.skeleton.head_inputs(state).flatten(0, 1).cpu() for state in hidden]
    found = {}
    for kind in kinds:
        state = STATISTICS[kind].start(inputs[0].shape[1])
        STATISTICS[kind].add_(state, inputs, original.workers)
        found[kind] = STATISTICS[kind].finish(state)
    return found


def _original(run: Run) -> Original:
    return Original(run.checkpoint, run.anatomy, _sample(run), device=run.device, workers=run.workers)


def _sample(run: Run) -> Windows:
    """The first windows of the calibration text, some thousand tokens."""
    assert run.windows is not None
    chosen = list(run.windows.ids)
    while len(chosen) > 1 and sum(map(len, chosen)) > SAMPLE_TOKENS:
        chosen.pop()
    return replace(run.windows, ids=tuple(chosen), tokens=sum(map(len, chosen)))
