"""Requests through the engine: ends, limits, streams, log-probabilities, and what others may not change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fettle.engine.completion import complete_with
from fettle.engine.contiguous_runner import ContiguousRunner
from fettle.engine.engine import Engine
from fettle.engine.prompts import Vocabulary
from fettle.engine.runners import RunnerOptions, open_engine
from fettle.engine.sampler import Sampling
from fettle.engine.scheduler import SchedulerOptions
from fettle.engine.sequence import Request
from fettle.engine.torch_runner import TorchRunner
from fettle.errors import NonFiniteError, UsageError
from fettle.models.loading import load

from .recall import VOCAB, Recall


def recalling(**options: int) -> Engine:
    return Engine(Recall(pages=64, page_size=4, context=100), options=SchedulerOptions(**options))


def drawn(temperature: float, seed: int, prompt: tuple[int, ...], count: int = 12) -> Request:
    return Request(prompt=prompt, sampling=Sampling(temperature=temperature, seed=seed), max_tokens=count)


def test_a_request_draws_the_same_alone_and_in_a_batch() -> None:
    requests = [drawn(1.0, seed, tuple(range(1 + seed)), 4 + 3 * seed) for seed in range(6)]
    alone = [recalling().generate([request])[0].tokens for request in requests]
    together = recalling(max_sequences=6, max_step_tokens=6).generate(requests)
    assert [made.tokens for made in together] == alone
    assert len(set(alone)) == 6


def test_stop_tokens_end_and_are_no_part_of_it() -> None:
    free = recalling().generate([Request(prompt=(1, 2), max_tokens=10)])[0].tokens
    made = recalling().generate([Request(prompt=(1, 2), max_tokens=10, stop_tokens=frozenset({free[4]}))])[0]
    assert made.stopped == "end"
    assert made.tokens == free[: free.index(free[4])]


def test_min_tokens_bans_ends_until_then() -> None:
    free = recalling().generate([Request(prompt=(1, 2), max_tokens=10)])[0].tokens
    request = Request(prompt=(1, 2), max_tokens=10, min_tokens=6, stop_tokens=frozenset(free[:6]))
    made = recalling().generate([request])[0].tokens
    assert len(made) >= 6
    assert not set(made) & set(free[:6])


def test_the_context_ends_a_completion() -> None:
    made = recalling().generate([Request(prompt=tuple(range(20)) * 4, max_tokens=50)])[0]
    assert made.stopped == "context"
    assert len(made.tokens) == 20
    with pytest.raises(UsageError, match="context holds 100"):
        recalling().add(Request(prompt=(1,) * 100))


def test_logprobs_are_the_models_own() -> None:
    engine = recalling()
    request = dataclasses.replace(drawn(2.0, 3, (4, 5)), logprobs=3, logit_bias={1: -50.0})
    made = engine.generate([request])[0]
    context = [4, 5]
    assert len(made.logprobs) == len(made.tokens) == 12
    assert isinstance(engine.runner, Recall)
    for said in made.logprobs:
        wanted = torch.log_softmax(torch.from_numpy(engine.runner.logits(np.array(context))), 0)
        assert said.logprob == pytest.approx(float(wanted[said.token]), abs=1e-5)
        assert [token for token, _ in said.top] == wanted.topk(3).indices.tolist()
        context.append(said.token)
    assert 1 not in made.tokens


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (VOCAB,)}, f"prompt names token {VOCAB}"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 65}, "min_tokens is 65"),
        ({"stop": ("",)}, "stop text is empty"),
        ({"stop": ("x",)}, "need a tokenizer"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logit_bias": {0: float("nan")}}, "logit_bias of token 0 is nan"),
        ({"logit_bias": {99: 1.0}}, "logit_bias names token 99"),
        ({"sampling": Sampling(top_k=0)}, "top_k is 0"),
    ],
)
def test_requests_that_cannot_be_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recalling().add(Request(**{"prompt": (1,), **fields}))


def test_a_cancelled_request_is_gone_and_the_others_do_not_notice() -> None:
    engine = recalling()
    wanted = recalling().generate([drawn(1.0, 1, (1, 2, 3))])[0].tokens
    kept, gone = engine.add(drawn(1.0, 1, (1, 2, 3))), engine.add(drawn(1.0, 2, (1, 2, 3)))
    engine.step()
    ended = engine.cancel(gone)
    assert ended is not None and ended.stopped == "cancelled" and len(ended.tokens) == 1
    assert engine.cancel(gone) is None
    done = {}
    while engine.busy:
        done.update({update.number: update.completion for update in engine.step() if update.completion})
    assert list(done) == [kept] and done[kept].tokens == wanted
    assert engine.scheduler.cache.free_pages == 64


def test_one_request_that_cannot_be_leaves_none_behind() -> None:
    engine = recalling()
    with pytest.raises(UsageError, match="max_tokens is 0"):
        engine.generate([Request(prompt=(1,)), Request(prompt=(1,), max_tokens=0)])
    assert not engine.busy and not engine.scheduler.waiting


def test_damaged_logits_drop_everything_and_say_so() -> None:
    engine = recalling()
    assert isinstance(engine.runner, Recall)
    engine.runner.sharpness = float("nan")
    engine.add(Request(prompt=(1, 2)))
    with pytest.raises(NonFiniteError, match="not finite"):
        engine.step()
    assert not engine.busy and engine.scheduler.cache.free_pages == 64


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> object:
    return load(tiny_llama)


def test_two_streams_are_served_by_the_same_steps(loaded) -> None:
    engine = Engine(TorchRunner(loaded, pages=20), Vocabulary.of_loaded(loaded))
    requests = [
        Request(prompt=engine.encode(text), max_tokens=9, sampling=Sampling(temperature=1.0))
        for text in ("def fox", "x =")
    ]
    wanted = [made.text for made in engine.generate(requests)]
    streams = [engine.stream(request) for request in requests]
    said = ["", ""]
    while streams:
        for index, stream in reversed(list(enumerate(streams))):
            try:
                said[index] += next(stream)
            except StopIteration as end:
                assert end.value.text == said[index]
                streams.remove(stream)
                if index == 0 and streams:
                    said[1] += "".join(streams.pop())
    assert said == wanted
    stream = engine.stream(requests[0])
    next(stream)
    assert engine.busy
    stream.close()
    assert not engine.busy and engine.scheduler.cache.free_pages == 20


def test_stop_texts_end_a_completion(loaded) -> None:
    engine = Engine(TorchRunner(loaded, pages=20), Vocabulary.of_loaded(loaded))
    request = Request(
        prompt=engine.encode("def fox"), max_tokens=30, sampling=Sampling(temperature=1.0, seed=5), ignore_end=True
    )
    free = engine.generate([request])[0]
    stop = free.text[6:9]
    made = engine.generate([dataclasses.replace(request, stop=(stop,))])[0]
    assert made.stopped == "stop"
    assert made.text == free.text[: free.text.index(stop)]
    assert made.tokens == free.tokens[: len(made.tokens)]


def test_paged_equals_contiguous_and_threads_change_no_token(loaded) -> None:
    from transformers import DynamicCache

    prompts = [tuple(int(t) for t in np.random.default_rng(n).integers(2, 320, n)) for n in (3, 30)]
    requests = [
        Request(prompt=p, max_tokens=8, sampling=Sampling(temperature=t, seed=9)) for p in prompts for t in (0, 1)
    ]
    found = []
    for runner in (
        TorchRunner(loaded, pages=60, page_size=8, threads=1),
        TorchRunner(loaded, pages=60, page_size=8, threads=2),
        TorchRunner(loaded, pages=20, page_size=8),
        ContiguousRunner(loaded, DynamicCache, tokens=120, sequences=4),
    ):
        engine = Engine(runner, options=SchedulerOptions(max_sequences=4, max_step_tokens=40))
        found.append([made.tokens for made in engine.generate(requests)])
        assert engine.scheduler.cache.free_pages == runner.shape.pages
    assert found[0] == found[1] == found[2] == found[3]


def test_an_opened_engine_says_what_a_loaded_model_says(loaded, tiny_llama: Path) -> None:
    engine = open_engine(tiny_llama, engine="torch", runner=RunnerOptions(cache_tokens=100))
    made = engine.generate([Request(prompt=engine.encode("def fox"), max_tokens=12)])[0]
    wanted = complete_with(loaded, "def fox", Sampling(), max_new_tokens=12)
    assert (made.text, made.tokens, made.stopped) == (wanted.text, wanted.tokens, wanted.stopped)
    assert made.prefill_tokens_per_second is not None and made.prefill_tokens_per_second > 0
    with pytest.raises(UsageError, match="unknown engine 'torhc'; did you mean 'torch'"):
        open_engine(tiny_llama, engine="torhc")
    with pytest.raises(UsageError, match="cache_tokens is 0"):
        open_engine(tiny_llama, runner=RunnerOptions(cache_tokens=0))
