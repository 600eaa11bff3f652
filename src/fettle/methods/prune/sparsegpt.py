"""SparseGPT: prune one column after another, and let the columns still to come make up for the error so far.

Frantar, Alistarh 2023, https://arxiv.org/abs/2301.00774. It is GPTQ's sweep (`methods/quantize/sweep.py`) with another
rounding: a pruned weight is one that is rounded to zero. What goes is decided when the sweep reaches it, for the next
128 columns at a time (for N:M, the next M), by what losing it will cost once later columns have made up for it:

    score = w_k² · L_kk²        w as earlier columns have changed it, H = L·Lᵀ the damped gram

which is w² / [H⁻¹]_kk of the columns that are left, the optimal brain surgeon's saliency. With `bits` and `heal: none`
what stays is rounded to codes in the same pass (the paper's section 3.5): later columns make up for both at once.

Ours differs in four ways. Rows are compared in tiles of 512. `correction` moves the weight that is approached by half
of what earlier blocks drifted, as for GPTQ. `heal: least_squares` moves all that stayed, of earlier columns too, which
the sweep had left behind, to the optimum of the mask (`healing.py`). And as later columns are then no longer the only
ones to make up for what goes, the mask comes from `rounds` of that instead of from the sweep: in each the weights with
the least w² / [H⁻¹]_jj go, among all columns, and what stays is healed. N:M keeps the sweep's mask, which measured no
worse. `heal: none` is the paper; `rounds: 1` heals behind the sweep.

`tune_steps` move what stayed of a whole block afterwards, by the gradient of its outputs (`kept_values.py`). Who says
nothing gets 100 of them in blocks of at most 4 · 2^20 weights: at 0.7 million weights they take half a minute of one
core, four times the rest (docs/results.md, "Masks"), and time grows with the weights, so such a block takes at most
about three minutes. In a larger one they have to be asked for. `heal: none` means the paper, without.

With `bits` a sweep that rounds follows from the healed weights, the mask held. Nothing is lost by that: at the optimum
h the error has no slope along what stayed, so tr((W - V)H(W - V)ᵀ) and tr((h - V)H(h - V)ᵀ) differ by a constant.

Cost: in³/3 for the factor, about out·in² multiply-adds a sweep; 30·out·in² for healing, 10·out·in² for each round but
the last. Memory: one float32 [in, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fettle.errors import NonFiniteError, RecipeError
from fettle.methods.protocols import Tuner
from fettle.methods.prune.fields import Healing, PruneFields
from fettle.methods.prune.healing import STEPS, least_squares
from fettle.methods.prune.kept_values import KeptValuesTuner
from fettle.methods.prune.pruning import check_weight, stored
from fettle.methods.prune.schedule import prune_in_rounds, sparsities
from fettle.methods.prune.selection import KnownMask, TilePruner, kept_by_score, on_the_way
from fettle.methods.quantize.columns import ColumnRounding
from fettle.methods.quantize.ranges import in_tensor_units
from fettle.methods.quantize.sharing import choose_shared
from fettle.methods.quantize.solvers import inverse_diagonal
from fettle.methods.quantize.sweep import (
    BLOCK,
    ROW_TILE,
    Factor,
    Kept,
    Pruner,
    RangeChooser,
    corrected,
    factorize,
    row_slices,
    sweep,
)
from fettle.methods.quantize.sweep_fields import SweepFields
from fettle.tensors.masked import MaskedScheme, MaskedTensor
from fettle.tensors.patterns import Pattern
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scales import stack
from fettle.tensors.scheme import Scheme

EARLY_STEPS = 10  # of healing in every round but the last
USUAL_STEPS = 100  # of the tuner where nobody said how many
MOST_WEIGHTS = 4 * 2**20  # of a block that is tuned without being asked
Tiles = Sequence[tuple[slice, Pruner]]  # rows that are worked on together, and what decides their mask


@dataclass(frozen=True, kw_only=True)
class SparseGpt(SweepFields, PruneFields):
    """Prunes column after column, and later columns make up for what went."""

    name: ClassVar[str] = "sparsegpt"
    title: ClassVar[str] = "SparseGPT"
    source: ClassVar[str] = "Frantar, Alistarh 2023, https://arxiv.org/abs/2301.00774"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "drift")
    objective: ClassVar[str] = "output_error"

    rounds: int = field(
        default=4,
        metadata={
            "help": "rounds that choose the mask and heal; 1, N:M and heal: none take the sweep's mask",
            "minimum": 1,
            "maximum": 64,
        },
    )
    heal: Healing = field(
        default="least_squares",
        metadata={"help": "move what stays so that the outputs change least, under the gram of the inputs"},
    )
    clip: Literal["none", "search"] = field(
        default="search", metadata={"help": "codes: the full range of each group, or the one with the least error"}
    )
    tune_steps: int | None = field(
        default=None,
        metadata={
            "help": f"gradient steps a block that move what stays; none for {USUAL_STEPS} in blocks of at most "
            f"{MOST_WEIGHTS // 2**20} · 2^20 weights, and for 0 in larger ones and with heal: none",
            "minimum": 0,
            "maximum": 100_000,
        },
    )
    tune_windows: int = field(default=8, metadata={"help": "windows a step of these", "minimum": 1})
    tune_rate: float = field(
        default=0.25,
        metadata={
            "help": "how far what stays can travel, in its root mean square",
            "minimum": 0.0,
            "maximum": 16.0,
        },
    )

    def tuner(self) -> Tuner[MaskedTensor] | None:
        """What moves the values that stayed of a whole block; None for no steps."""
        usual = 0 if self.heal == "none" else USUAL_STEPS
        steps = usual if self.tune_steps is None else self.tune_steps
        if not steps:
            return None
        most = MOST_WEIGHTS if self.tune_steps is None else None
        return KeptValuesTuner(steps=steps, batch_windows=self.tune_windows, rate=self.tune_rate, most_weights=most)

    def validate(self) -> None:
        """Checks that the fields fit together.

        Raises:
            RecipeError: as for every pruning method; blocks whose rows no tile holds whole; what is about a tuner that
                does not run.
        """
        super().validate()
        for found in fields(self):
            ignored = found.name in ("tune_windows", "tune_rate") and self.tuner() is None
            if ignored and getattr(self, found.name) != found.default:
                raise RecipeError(
                    f"{found.name} is about tuning, and nothing is tuned (tune_steps={self.tune_steps}, heal="
                    f"{self.heal}); set tune_steps: {USUAL_STEPS}, or leave it out"
                )
        pattern = self.scheme("float32").shape_of_mask
        if ROW_TILE % pattern.rows:
            raise RecipeError(
                f"pattern={self.pattern!r}: sparsegpt works on {ROW_TILE} rows at a time; use blocks whose rows divide "
                "that"
            )

    def _steps(self) -> list[float]:
        scheme = self.scheme("float32")
        swept = self.rounds == 1 or scheme.shape_of_mask.kind == "n:m"
        return [] if swept else sparsities(scheme.sparsity, self.rounds, self.schedule)

    def scores(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """The optimal brain surgeon's saliency, w² / [H⁻¹]_jj, float32 [out, in]: for a threshold over all linears."""
        factor = factorize(statistics["gram"], damping=self.damping, activation_order=False)
        return weight.float().square() / inverse_diagonal(factor)

    def compress(self, weight: Tensor, statistics: Mapping[str, Tensor], *, dtype: str) -> MaskedTensor:
        """Prunes weight [out, in], and rounds what stays where codes are asked for."""
        check_weight(weight)
        drift = statistics["drift"] * self.correction if self.correction > 0 and "drift" in statistics else None
        return sparsegpt(
            weight, statistics["gram"], self.scheme(dtype), damping=self.damping, clip=self.clip, heal=self.heal,
            drift=drift, steps=self._steps(),
        )  # fmt: skip


def _in_rounds(
    target: Tensor, factor: Factor, gram: Tensor, scheme: MaskedScheme, steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Values, float32 [out, in], and what stays, by rounds of the surgeon's saliency and healing."""
    pattern, diagonal = scheme.shape_of_mask, inverse_diagonal(factor)
    left = len(steps)

    def prune(state: tuple[Tensor, Tensor], sparsity: float) -> tuple[Tensor, Tensor]:
        kept = kept_by_score(state[0].square() / diagonal, on_the_way(pattern, sparsity), sparsity)
        return state[0] * kept, kept

    def heal(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal left
        left -= 1
        patience = EARLY_STEPS if left else STEPS
        return least_squares(target, *state, gram, damping=factor.damping, steps=patience), state[1]

    return prune_in_rounds((target, torch.ones_like(target, dtype=torch.bool)), steps, prune, heal)


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    scheme: MaskedScheme,
    *,
    damping: float = 0.01,
    clip: str = "search",
    heal: Healing = "none",
    drift: Tensor | None = None,
    steps: Sequence[float] = (),
) -> MaskedTensor:
    """Weight [out, in] pruned so that its outputs on inputs with this gram [in, in] change least; pure.

    Args:
        weight: [out, in], any floating type.
        gram: float32 [in, in].
        scheme: pattern, sparsity, values or codes.
        damping: added to the gram's diagonal, as a part of its mean.
        clip: how a group's range is chosen, where there are codes.
        heal: whether what stays is moved to the optimum of the mask.
        drift: float32 [in, in], as much of it as is to be made up for; None for none.
        steps: the sparsity of each round, where healed rounds choose the mask; empty: the sweep does.

    Raises:
        NonFiniteError: NaN or infinity in the gram, or a scale or value beyond its type.
    """
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise NonFiniteError("the gram of this linear's inputs holds NaN or infinity; check the block before it")
    factor = factorize(gram, damping=damping, activation_order=False)
    target = weight.float() if drift is None else corrected(weight, drift, factor, 1.0)
    if scheme.values is not None and heal == "none":
        return _with_codes(target, _tiles(target, scheme), factor, scheme, scheme.values, clip)
    if heal == "least_squares" and steps:
        values, kept = _in_rounds(target, factor, gram, scheme, steps)
    else:
        values, kept = _with_values(target, factor, scheme)
    if heal == "least_squares" and not steps:
        values = least_squares(target, values, kept, gram, damping=factor.damping)
    if scheme.values is None:
        return stored(values, kept, scheme)
    width = scheme.values.group_width(weight.shape[1])
    tiles = [(rows, KnownMask(kept=kept[rows], width=width)) for rows in row_slices(len(kept))]
    return _with_codes(values, tiles, factor, scheme, scheme.values, clip)


def _with_values(target: Tensor, factor: Factor, scheme: MaskedScheme) -> tuple[Tensor, Tensor]:
    """What stays and its values, float32 [out, in]."""
    columns = Kept()
    swept = [sweep(target[rows], factor, columns, pruner=pruner) for rows, pruner in _tiles(target, scheme)]
    kept = torch.cat([tile.kept for tile in swept if tile.kept is not None])
    return torch.cat([tile.codes for tile in swept]) * kept, kept


def _with_codes(
    target: Tensor, tiles: Tiles, factor: Factor, scheme: MaskedScheme, codes: Scheme, clip: str
) -> MaskedTensor:
    """What stays, in codes that the sweep chooses; the mask is chosen in the same sweep, or known."""
    masks: list[Tensor] = []

    def solve(units: Tensor) -> QuantizedTensor:
        importance = torch.empty_like(factor.pivots)
        importance[factor.order] = factor.pivots
        shared = choose_shared(units, codes, clip=clip, importance=importance)
        chooser = RangeChooser(scheme=codes, clip=clip, importance=importance)
        found = []
        for rows, pruner in tiles:
            columns = ColumnRounding(shared.rows(rows, codes), scheme=codes, rows=rows.stop - rows.start)
            renewing = chooser if codes.granularity != "tensor" else None
            width = codes.group_width(units.shape[1])
            swept = sweep(units[rows], factor, columns, width=width, chooser=renewing, pruner=pruner)
            found.append(QuantizedTensor.of(swept.codes, columns.shared(), codes))
            assert swept.kept is not None
            masks.append(swept.kept)
        together = shared if codes.granularity == "tensor" else stack([tile.shared for tile in found])
        return QuantizedTensor.of(torch.cat([tile.codes for tile in found]), together, codes)

    quantized = in_tensor_units(target, codes, solve)
    return MaskedTensor.of_codes(quantized, torch.cat(masks), scheme)


def _tiles(weight: Tensor, scheme: MaskedScheme) -> Tiles:
    """The tiles of rows with what decides their masks; together exactly as many weights go as the scheme says."""
    out_features, in_features = weight.shape
    pattern = scheme.shape_of_mask
    unit = pattern.rows * pattern.columns if pattern.kind == "block" else 1
    total = pattern.pruned_count((out_features, in_features), scheme.sparsity) // unit
    found: list[tuple[slice, Pruner]] = []
    for rows in row_slices(out_features):
        due = total * rows.stop // out_features - total * rows.start // out_features
        found.append(
            (rows, TilePruner(pattern=pattern, total=due * unit, in_features=in_features, width=_width(pattern)))
        )
    return found


def _width(pattern: Pattern) -> int:
    """Columns that are decided together: M, or about 128 in whole blocks."""
    return pattern.columns if pattern.kind == "n:m" else pattern.columns * max(1, BLOCK // pattern.columns)
