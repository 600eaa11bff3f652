"""The calibration windows on their way through the model, and what they tell about each linear.

A `Stream` holds the hidden states of every window in front of the current block. `collect` runs them through the block
as it stands and sums up what the methods of its linears declared; `run_on` runs them through for good.

Where a method looks at the drift (how far the compressed blocks moved the inputs), the base's own states travel beside
them, through a second copy of the block as it was. Inputs that were rescaled in the one are divided in what is taken
from the other, so that both are in the same units.

An expert of a mixture sees only the tokens that its router sends it: its statistics are its own tokens', and an expert
that saw fewer than a quarter as many tokens as it has inputs is compressed with the statistic's neutral element (a
gram that is the identity: every input counts the same), which the ledger says. A mean over few tokens would look like
knowledge and be noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fettle.errors import ModelError, NonFiniteError
from fettle.methods.protocols import InputObserver
from fettle.methods.quantize.errors import output_error, weight_error
from fettle.methods.statistics import FEWEST_TOKENS, STATISTICS
from fettle.models.anatomy import Anatomy, Linear
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.skeleton import Skeleton
from fettle.pipeline.journal import LedgerLine
from fettle.pipeline.layout import Compression, Layout, Unit
from fettle.pipeline.loss_gradients import LossGradients
from fettle.tensors.levels import weight_sharing_ratio
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme
from fettle.tensors.weights import CompressedWeight
from fettle.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a walk needs and that does not change while it runs."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    layout: Layout
    windows: tuple[Tensor, ...]  # int64 [tokens] each; empty where no method declares a statistic
    order: str  # "together" | "in_turn"
    device: str
    workers: Workers

    @property
    def last_data_unit(self) -> int:
        """The last unit with a method that looks at data; -1 where none does."""
        return max((u.index for u in self.layout.units if any(c.looks_at_data for c in u.compressed)), default=-1)

    @property
    def tunes(self) -> bool:
        """Whether some method wants a block's original outputs."""
        return any(item.tuner is not None for item in self.layout.compressions)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the windows told about one group of linears with the same inputs."""

    statistics: dict[str, Tensor]
    tokens: int
    note: str = ""
    neutral: bool = False  # the statistics say nothing


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What compressing one linear gave."""

    quantized: CompressedWeight
    line: LedgerLine


def compress_linear(item: Compression, weight: Tensor, seen: Seen | None, job: Job) -> Outcome:
    """Calls the method on one weight (float32 [out, in]) and writes down what it cost."""
    started = time.monotonic()
    statistics = seen.statistics if seen is not None else {}
    dtype = str(job.checkpoint.dtype).removeprefix("torch.")
    try:
        quantized = item.method.compress(weight, statistics, dtype=dtype)
    except NonFiniteError as found:
        raise NonFiniteError(f"{item.linear.weight_name}: {found}") from found
    if item.scheme.has_input_scale:
        assert isinstance(item.method, InputObserver) and isinstance(quantized, QuantizedTensor)
        quantized = replace(quantized, input_scale=item.method.input_scale(statistics, dtype=dtype))
    gram = statistics.get("gram") if seen is not None and not seen.neutral else None
    error = weight_error(weight, quantized) if gram is None else output_error(weight, quantized, gram)
    line = LedgerLine(
        linear=item.linear.name,
        block=item.linear.block,
        role=item.linear.role,
        method=item.method.name,
        scheme=item.scheme.describe(),
        error=error,
        objective="weight_error" if gram is None else "output_error",
        bits_per_weight=item.scheme.bits_per_weight(item.linear.shape, job.layout.storage_of(item)),
        seconds=time.monotonic() - started,
        note="; ".join(filter(None, [seen.note if seen is not None else "", _sharing_note(item, job), item.untuned])),
    )
    return Outcome(quantized=quantized, line=line)


def _sharing_note(item: Compression, job: Job) -> str:
    """How much smaller shared values make a linear: by the formula of the literature, and in the bytes of the file."""
    scheme, shape = item.scheme, item.linear.shape
    if not isinstance(scheme, Scheme) or not scheme.grid.is_learned:
        return ""
    weights, base_bits = math.prod(shape), 8 * job.checkpoint.dtype.itemsize
    tables = math.prod(scheme.scale_shape(shape))
    formula = weight_sharing_ratio(weights / tables, scheme.grid.level_count, base_bits)
    stored = base_bits / scheme.bits_per_weight(shape, job.layout.storage_of(item))
    return (
        f"{scheme.grid.level_count} shared values: n·b / (n·log2 k + k·b) = {formula:.3f}, in stored bytes {stored:.3f}"
    )


def renewed(outcome: Outcome, quantized: CompressedWeight, weight: Tensor, seconds: float) -> Outcome:
    """The outcome with codes that a tuner chose instead; their error is that of the weights, as no gram says what they
    were chosen for.
    """
    line = replace(
        outcome.line, error=weight_error(weight, quantized), objective="weight_error",
        seconds=outcome.line.seconds + seconds,
    )  # fmt: skip
    if isinstance(quantized, QuantizedTensor):
        before = outcome.quantized
        scale = before.input_scale if isinstance(before, QuantizedTensor) else None
        quantized = replace(quantized, input_scale=scale)
    return Outcome(quantized=quantized, line=line)


class Stream:
    """The hidden states of every window before the current block; see the module's text."""

    def __init__(self, job: Job, kept: list[Tensor] | None) -> None:
        self.job = job
        self.skeleton = Skeleton.build(job.checkpoint, job.anatomy, device=job.device)
        # Embedding also records the arguments (masks, positions) that every block gets for a window of this length,
        # so a resumed run embeds again; it then takes up the kept states.
        embedded = [self.skeleton.embed(ids.unsqueeze(0)) for ids in job.windows]
        self.skeleton.free_head()
        states = embedded if kept is None else [state.to(job.device) for state in kept]
        self.twin: Skeleton | None = None  # the same block as the base has it, where a method looks at the drift
        paired = any(STATISTICS[kind].paired for item in job.layout.compressions for kind in item.statistics)
        if paired or (job.windows and job.tunes):
            self.twin = Skeleton.build(job.checkpoint, job.anatomy, device=job.device)
            for ids in {len(window): window for window in job.windows}.values():
                self.twin.embed(ids.unsqueeze(0))
            self.twin.free_head()
        self._gradients: LossGradients | None = None
        if any(item.wants_gradient for item in job.layout.compressions):
            self._gradients = LossGradients(
                job.checkpoint, job.anatomy, job.windows, device=job.device, workers=job.workers
            )
        self.factors: dict[str, Tensor] = {}  # input group → what the loaded block's inputs were divided by, [in]
        count = len(job.windows)
        self.hidden = states[:count]
        # A resumed run kept both; a fresh one starts both from the same embeddings.
        self.original = (states[count:] or list(states)) if self.twin is not None else []

    @property
    def state(self) -> list[Tensor]:
        """What has to be kept for a resumed run."""
        return [*self.hidden, *self.original]

    def load_block(self, block: int) -> None:
        """Reads a block from the base."""
        self.skeleton.load_block(block)
        if self.twin is not None:
            self.twin.load_block(block)

    def gradients(self, block: int) -> dict[str, Tensor]:
        """The statistic "gradient" of a block's linears by name; nothing where no method looks at it."""
        return {} if self._gradients is None else self._gradients.of_block(block)

    def free_block(self, block: int) -> None:
        """Takes the compressed block's memory back."""
        self.factors = {}
        self.skeleton.free_block(block)

    def checked_weight(self, linear: Linear) -> Tensor:
        """The weight as it stands in the loaded block, float32 [out, in]; NonFiniteError names it."""
        weight = self.skeleton.weight(linear)
        check_finite(linear.weight_name, weight)
        return weight.cpu()

    def collect(self, block: int, asked: Iterable[tuple[Linear, Sequence[str]]]) -> dict[str, Seen]:
        """The statistics that are asked for of linears' inputs, by input group; sends every window as far as needed."""
        asked = [(linear, kinds) for linear, kinds in asked if kinds]
        wanted = {linear.input_group: linear.shape[1] for linear, _ in asked}
        if not wanted:
            return {}
        experts = {linear.input_group for linear, _ in asked if linear.expert is not None}
        declared = {
            group: sorted({kind for linear, kinds in asked if linear.input_group == group for kind in kinds})
            for group in wanted
        }
        for group in experts & declared.keys():  # the original's router sends other tokens: there are no pairs
            declared[group] = [kind for kind in declared[group] if not STATISTICS[kind].paired]
        paired = frozenset(g for g, kinds in declared.items() if any(STATISTICS[k].paired for k in kinds))
        states = {(g, k): STATISTICS[k].start(wanted[g]) for g, kinds in declared.items() for k in kinds}
        tokens = dict.fromkeys(wanted, 0)
        workers = self.job.workers
        batch = max(1, workers.threads)  # bounds the inputs that are held at once
        for first in range(0, len(self.hidden), batch):
            window = range(first, min(first + batch, len(self.hidden)))
            seen = workers.map(lambda i: self.skeleton.inputs_of(block, self.hidden[i], frozenset(wanted)), window)
            before = workers.map(lambda i: self._original_inputs(block, i, paired), window)
            for group, kinds in declared.items():
                inputs = [taken[group] for taken in seen if group in taken]
                if inputs and inputs[0].shape[-1] != wanted[group]:
                    raise ModelError(
                        f"{group} reads inputs of width {inputs[0].shape[-1]}, and its weight has {wanted[group]} "
                        "columns: the family stores it turned. Leave it out with where:, or use a method without "
                        "calibration"
                    )
                tokens[group] += sum(len(x) for x in inputs)
                for kind in kinds if inputs else ():
                    pairs = [torch.stack((b[group], a[group])) for a, b in zip(seen, before, strict=True) if group in b]
                    given = pairs if STATISTICS[kind].paired else inputs
                    STATISTICS[kind].add_(states[group, kind], given, workers)
        unseen = sorted(group for group in wanted if not tokens[group] and group not in experts)
        if unseen:
            raise ModelError(
                f"no product with the weights that read {', '.join(unseen[:3])} was seen while block {block} ran: this "
                "architecture multiplies in a way that fettle does not recognise. Use a method without calibration, "
                "such as round_to_nearest, or leave them out with where:"
            )
        return {group: self._seen(group, declared[group], states, tokens[group], wanted[group]) for group in wanted}

    def _original_inputs(self, block: int, window: int, groups: frozenset[str]) -> dict[str, Tensor]:
        if not groups or self.twin is None:
            return {}
        found = self.twin.inputs_of(block, self.original[window], groups)
        return {group: x / self.factors[group] if group in self.factors else x for group, x in found.items()}

    def _seen(
        self, group: str, kinds: list[str], states: dict[tuple[str, str], object], tokens: int, in_features: int
    ) -> Seen:
        if tokens < FEWEST_TOKENS * in_features and any(STATISTICS[kind].needs_many for kind in kinds):
            few = {
                kind: STATISTICS[kind].finish(states[group, kind]) for kind in kinds if not STATISTICS[kind].needs_many
            }
            return Seen(
                statistics={kind: STATISTICS[kind].neutral(in_features) for kind in kinds} | few,
                tokens=tokens,
                note=f"saw {tokens} tokens, fewer than a quarter of its {in_features} inputs: compressed without "
                "statistics",
                neutral=True,
            )
        found = {kind: STATISTICS[kind].finish(states[group, kind]) for kind in kinds}
        for kind, value in found.items():
            low, high = torch.aminmax(value)  # they carry NaN and infinity along, without a mask as large as a gram
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise NonFiniteError(f"the inputs of {group} hold NaN or infinity ({kind}); check the block before it")
        return Seen(statistics=found, tokens=tokens)

    def outside_statistics(self, unit: Unit) -> dict[str, Seen]:
        """The same for what stands outside the blocks, by the linear's name.

        The head reads the final norm of the last block's outputs, and so does a tied embedding. An embedding of its
        own is looked
        up, not multiplied: it has no inputs, and gets the neutral statistic.
        """
        found = {}
        for item in unit.compressed:
            kinds = sorted(kind for kind in item.statistics if not STATISTICS[kind].paired)
            if not kinds:
                continue
            in_features = item.linear.shape[1]
            if item.linear.role != "head" and not self.job.anatomy.tied:
                neutral = {kind: STATISTICS[kind].neutral(in_features) for kind in kinds}
                found[item.linear.name] = Seen(
                    statistics=neutral,
                    tokens=0,
                    note="a table has no inputs: compressed without statistics",
                    neutral=True,
                )
                continue
            states = {(item.linear.name, kind): STATISTICS[kind].start(in_features) for kind in kinds}
            tokens = 0
            for hidden in self.hidden:
                inputs = self.skeleton.head_inputs(hidden).flatten(0, 1).cpu()
                tokens += len(inputs)
                for kind in kinds:
                    STATISTICS[kind].add_(states[item.linear.name, kind], [inputs], self.job.workers)
            found[item.linear.name] = self._seen(item.linear.name, kinds, states, tokens, in_features)
        return found

    def leave_original(self, block: int) -> None:
        """Sends the base's own states through its block for good, and takes that block's memory back."""
        if self.twin is not None:
            twin = self.twin
            self.original = self.job.workers.map(lambda state: twin.run_block(block, state), self.original)
            twin.free_block(block)

    def run_on(self, block: int) -> None:
        """Sends every window through the block as it stands now; NonFiniteError names the block."""
        self.hidden = self.job.workers.map(lambda state: self.skeleton.run_block(block, state), self.hidden)
        for index, state in enumerate(self.state):
            if not torch.isfinite(state).all():
                raise NonFiniteError(
                    f"block {block} ({self.job.anatomy.blocks[block].name}) turns window {index % len(self.hidden)} into "  # noqa: E501
                    "NaN or infinity; its weights cannot compute this text in float32"
                )
