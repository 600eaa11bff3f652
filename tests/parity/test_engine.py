"""The engine against transformers' own greedy search, token for token, for every decoder family.

Six prompts of all lengths share a prefix or not, in a cache that is too small for them, read in chunks, thrown out
and computed again, with guessed tokens: nothing of it may change a token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fettle.engine.engine import Engine
from fettle.engine.payoff import Payoff
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request, Sequence
from fettle.engine.speculative import Drafter, PromptLookup
from fettle.engine.torch_runner import TorchRunner
from fettle.errors import UsageError
from fettle.models.loading import load

from .tiny_models import TINY, random_ids, write_model

DECODERS = [name for name in TINY if not name.startswith("bert")]
NEW = 14


class Always(Payoff):
    def wanted(self, sequence: Sequence, drafter: Drafter) -> int:
        return self.most


def prompts() -> list[tuple[int, ...]]:
    found = [tuple(random_ids(count, seed=count).tolist()) for count in (3, 13, 22, 31)]
    return [*found, found[3][:16], (*found[3][:18], 5, 6)]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_equals_transformers_whatever_the_scheduler_does(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    loaded = load(tmp_path)
    wanted = [
        tuple(
            loaded.model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
        )
        for prompt in prompts()
    ]
    engine = Engine(
        TorchRunner(loaded, pages=13, page_size=4),
        options=SchedulerOptions(max_sequences=4, max_step_tokens=12),
        drafter=PromptLookup(longest=2, shortest=1),
        payoff=Always(2),
    )
    made = engine.generate(Request(prompt=prompt, max_tokens=NEW) for prompt in prompts())
    assert [completion.tokens for completion in made] == wanted
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.cache.reused_tokens > 0
    assert engine.scheduler.cache.free_pages == 13
    assert engine.payoff is not None and engine.payoff.accepted > 0


def test_an_encoder_has_no_runner(tmp_path: Path) -> None:
    write_model("bert", tmp_path)
    with pytest.raises(UsageError, match="is an encoder"):
        TorchRunner(load(tmp_path), pages=4)
