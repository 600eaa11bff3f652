"""Moving factors between what feeds linears and the linears leaves every family's model the same function."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fettle.methods.registry import from_fields
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.families import FAMILIES
from fettle.models.parts import Feed
from fettle.pipeline import rescaling
from fettle.pipeline.layout import build_layout
from fettle.pipeline.stream import Job, Stream
from fettle.workers import Workers

from .conftest import Written
from .tiny_models import TINY, random_ids

NAMES = sorted(TINY)
WINDOWS = tuple(random_ids(length, seed=length) for length in (40, 33, 40))

# reads → what feeds it, of one block of each tiny model: a feed that goes missing is a loss that no equality shows.
EXPECTED = {
    "llama": 4, "llama-tied-biased": 4, "llama3": 4, "mistral": 4, "qwen2": 4, "qwen3": 4, "phi3": 4,
    "phi3-longrope": 4, "gemma2": 4, "gpt2": 3, "gpt_neo": 3, "gpt_neox": 3, "mixtral": 2 + 4, "qwen3_moe": 2 + 6,
    "bert": 1, "bert-masked-lm": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RandomFactors:
    """A rescaler that draws factors from 0.2 to 5."""

    statistics = ("absolute_mean",)
    drawn: list[Tensor] = field(default_factory=list, compare=False)

    def factors(
        self, weights: list[Tensor], statistics: Mapping[str, Tensor], channels: Tensor, *, dtype: str
    ) -> Tensor:
        generator = torch.Generator().manual_seed(len(weights) + weights[0].shape[1])
        return (5 ** (2 * torch.rand(int(channels.max()) + 1, generator=generator) - 1)).float()


class Rescaling:
    """round_to_nearest with random factors."""

    def __init__(self) -> None:
        self._method = from_fields("round_to_nearest", {"bits": 8})
        self._rescaler = RandomFactors()

    def __getattr__(self, name: str) -> object:
        return getattr(self._method, name)

    def rescaler(self) -> RandomFactors:
        return self._rescaler


def rescaled_outputs(folder: Path) -> tuple[list[Tensor], list[Tensor], Anatomy, dict[str, str], dict[str, Tensor]]:
    """The model's outputs as it is and with every feed rescaled, its anatomy, the notes and the written tensors."""
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint)
    method = Rescaling()
    assigned = {linear.name: method for linear in anatomy.linears() if linear.role != "router"}
    layout = build_layout(checkpoint, anatomy, assigned, "pack-quantized")  # type: ignore[arg-type]
    notes: dict[str, str] = {}
    written: dict[str, Tensor] = {}
    with Workers(1) as workers, torch.no_grad():
        job = Job(
            checkpoint=checkpoint, anatomy=anatomy, layout=layout, windows=WINDOWS, order="together", device="cpu",
            workers=workers,
        )  # fmt: skip
        stream, plain = Stream(job, None), Stream(job, None)
        for unit in layout.units:
            if unit.block is None:
                continue
            for each in (stream, plain):
                each.load_block(unit.block)
            found = rescaling.rescale_block(job, unit, stream)
            notes |= found.notes
            written |= found.tensors
            for each in (stream, plain):
                each.run_on(unit.block)
                each.free_block(unit.block)
        ours, theirs = ([each.skeleton.output(hidden) for hidden in each.hidden] for each in (stream, plain))
    return ours, theirs, anatomy, notes, written


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).abs().max()) < 1e-4 * float(other.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_rescaled_model_is_the_same_function(written: Written, name: str) -> None:
    folder, _ = written(name)
    ours, theirs, anatomy, notes, tensors = rescaled_outputs(folder)
    assert_equal(ours, theirs)
    block = anatomy.blocks[0]
    assert len(block.feeds) == EXPECTED[name]
    done = {linear for linear, note in notes.items() if note.startswith("inputs rescaled by")}
    fed = {linear.name for linear in block.linears if linear.input_group in {feed.input_group for feed in block.feeds}}
    experts = {linear.name for linear in block.linears if linear.expert is not None}
    assert (fed - experts) <= done, "every feed but those of experts that saw too little was rescaled"
    assert len(fed & experts & done) >= (1 if experts else 0)
    base = Checkpoint.open(folder)
    for tensor, values in tensors.items():
        assert values.dtype == base.entries[tensor].dtype
        assert not torch.equal(values, base.read(tensor)), tensor


def test_every_family_says_what_feeds_its_linears() -> None:
    assert all(family.sources for family in FAMILIES)


FAULTS = {
    "the norm keeps what it should lose": "divide_norm",
    "the bias keeps what it should lose": "_divide_bias",
    "neighbours instead of query heads share a channel": "channels",
    "the wrong rows are divided": "source_rows",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_show(written: Written, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"divide_norm": "gemma2", "_divide_bias": "qwen2", "channels": "llama", "source_rows": "gpt_neox"}[
        FAULTS[fault]
    ]
    if FAULTS[fault] == "divide_norm":
        monkeypatch.setattr(rescaling, "divide_norm", lambda norm, bias, factors, offset: (factors, norm, bias))
    elif FAULTS[fault] == "_divide_bias":
        monkeypatch.setattr(rescaling, "_divide_bias", lambda bias, rows, factors: (factors, bias))
    elif FAULTS[fault] == "channels":
        monkeypatch.setattr(Feed, "channels", lambda feed, count: [k // feed.repeats[1] for k in range(count)])
    else:
        real = Feed.source_rows
        monkeypatch.setattr(Feed, "source_rows", lambda feed, out: sorted(range(out))[-len(real(feed, out)) :])
    ours, theirs, *_ = rescaled_outputs(written(name)[0])
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_stored_norm_times_the_factors_is_the_norm(offset: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.randn(200, generator=generator).to(dtype)
    norm[:8] = torch.tensor([0.0, -1.0, 1.0, 1e-6, -1e-6, 6e4, 1e-3 - 1, 3.0]).to(dtype)
    bias = torch.randn(200, generator=generator).to(dtype)
    bias[0] = 6e4
    wanted = 10 ** (4 * torch.rand(200, generator=generator) - 2)
    moved, stored, divided = rescaling.divide_norm(norm, bias, wanted, offset)
    assert stored.dtype == dtype and divided is not None and divided.dtype == dtype
    assert bool((moved > 0).all() & torch.isfinite(moved).all() & torch.isfinite(divided).all())
    torch.testing.assert_close((offset + stored.float()) * moved, offset + norm.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(divided.float() * moved, bias.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    near = (moved / wanted - 1).abs() < 0.01
    # rounding moves a factor a little; where 1 + norm is nearly nothing it moves it much, or forbids it
    assert int(near.sum()) > (170 if offset == 0 else 130)


@functools.cache
def column_map(span: int, times: int, count: int) -> list[int]:
    feed = Feed(input_group="", weight_name="", bias_name=None, linear=None, repeats=(span, times))
    return feed.channels(count)


def test_query_heads_read_their_key_value_heads_channels() -> None:
    assert column_map(2, 3, 12) == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    assert column_map(1, 1, 4) == [0, 1, 2, 3]
    feed = Feed(input_group="", weight_name="", bias_name=None, linear=None, rows=(4, 2, 6))
    assert feed.source_rows(12) == [4, 5, 10, 11]
