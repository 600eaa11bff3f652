"""What guessing tokens brings: prompt look-up and a 2-bit draft, on text that repeats itself and on text that does not.

python benchmarks/engine/speculation.py [MODEL] [--engine torch] [--tokens 192] [--repetitions 5]

The draft is the model itself, rounded to 2 bits. "repetitive": greedy completions of code that repeats itself.
"varied": draws at temperature 1.2, where hardly any guess is right. Each way has an engine and pages of its own on one
runner, and all of them make the same tokens at the same time, a step each in turn, so that what else the machine does
meets all alike. A step that was held up counts as four plain ones. A speed-up is the median of the repetitions' ratios
of decoding time, without the steps that read a prompt; "plain_again" is the same as plain and says what noise is left.
The tokens must be equal. `--always` adds ways that guess in every step, whether it pays or not. One JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fettle
from fettle import Request, RunnerOptions, Sampling, SchedulerOptions
from fettle.engine.engine import Engine
from fettle.engine.payoff import Payoff
from fettle.engine.runner import NO_PAGE, Batch, Runner
from fettle.engine.runners import LOOKUP, open_drafter, open_engine
from fettle.engine.sequence import Sequence
from fettle.engine.speculative import Drafter

CODE = "def area(width, height):\n    return width * height\n\n"
PROMPTS = {
    "repetitive": [
        CODE * 3 + "def area(",
        "names = [\n" + "    'alpha',\n    'beta',\n    'gamma',\n" * 3,
        "x = 1\n" * 12,
    ],
    "varied": ["import os", "class Reader:", "# The first thing to do is"],
}


PART_TOKENS = 1024  # of the cache, for each way
HELD_UP = 4  # plain steps that a step counts as at most
ALONE = SchedulerOptions(max_sequences=1, reuse_prefixes=False)


class Part:
    """A runner's pages from number · pages / parts on, as if there were no others."""

    def __init__(self, runner: Runner, number: int, parts: int) -> None:
        self._runner = runner
        self.shape = dataclasses.replace(runner.shape, pages=runner.shape.pages // parts)
        self._first = number * self.shape.pages

    def run(self, batch: Batch) -> NDArray[np.float32]:
        table = np.where(batch.page_table == NO_PAGE, NO_PAGE, batch.page_table + self._first).astype(np.int32)
        return self._runner.run(dataclasses.replace(batch, page_table=table, copies=batch.copies + self._first))


class Always(Payoff):
    """Guesses in every step."""

    def wanted(self, sequence: Sequence, drafter: Drafter) -> int:
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--guesses", type=int, default=4)
    parser.add_argument("--always", action="store_true", help="also guess in every step, which may take long")
    asked = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "engine/speculation", "model": asked.model, "engine": asked.engine}
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft"
        two_bits = {"name": "two bits", "steps": [{"method": "hqq", "bits": 2, "group_size": 32}]}
        recipe = Path(folder) / "two-bits.yaml"
        recipe.write_text(json.dumps(two_bits))
        fettle.compress(asked.model, draft, recipe, evaluate=False)
        names = ["plain", "plain_again", "lookup", "draft", *(["lookup_always", "draft_always"] * asked.always)]
        target = open_engine(
            asked.model, engine=asked.engine, runner=RunnerOptions(cache_tokens=PART_TOKENS * len(names))
        )
        # Whoever comes to a text first knows nothing: engines are made anew for each.
        for text, prompts in PROMPTS.items():
            sampling = Sampling() if text == "repetitive" else Sampling(temperature=1.2, seed=7)
            requests = [
                Request(prompt=target.encode(prompt), max_tokens=asked.tokens, sampling=sampling, ignore_end=True)
                for prompt in prompts
            ]
            ways = {}
            for number, name in enumerate(names):
                part = Part(target.runner, number, len(names))
                kind, _, always = name.partition("_")
                drafter = payoff = None
                if kind != "plain":
                    what = LOOKUP if kind == "lookup" else draft
                    drafter = open_drafter(what, part, asked.engine, RunnerOptions())
                    payoff = Always(asked.guesses) if always else Payoff(asked.guesses)
                ways[name] = Engine(part, target.vocabulary, ALONE, drafter=drafter, payoff=payoff)
            found[text] = compare(ways, requests, asked.repetitions)
    print(json.dumps(found))


def race(ways: dict[str, Engine], request: Request) -> tuple[dict[str, list[float]], dict[str, tuple[int, ...]]]:
    """Seconds of each decoding step, and the tokens, of all ways side by side."""
    steps: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, tuple[int, ...]] = {}
    for engine in ways.values():
        engine.add(request)
    names = list(ways)
    while len(tokens) < len(ways):
        names = [*names[1:], names[0]]
        for name in names:
            engine = ways[name]
            if not engine.busy:
                continue
            began, reads = time.perf_counter(), not steps[name] and engine.scheduler.waiting
            updates = engine.step()
            if not reads:
                steps[name].append(time.perf_counter() - began)
            for update in updates:
                if update.completion is not None:
                    tokens[name] = update.completion.tokens
    return steps, tokens


def compare(ways: dict[str, Engine], requests: list[Request], repetitions: int) -> dict[str, Any]:
    """Speed-up over plain, acceptance and whether the tokens are the same, by way of guessing."""
    for engine in ways.values():  # the first steps of a process are slow
        if engine.payoff is None:
            engine.generate([dataclasses.replace(requests[0], max_tokens=16)])
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    rates, same = [], True
    for _ in range(repetitions):
        seconds = dict.fromkeys(ways, 0.0)
        for request in requests:
            steps, tokens = race(ways, request)
            longest = HELD_UP * statistics.median(steps["plain"])
            for name, each in steps.items():
                seconds[name] += sum(min(took, longest) for took in each)
            same = same and len(set(tokens.values())) == 1
        rates.append(len(requests) * (requests[0].max_tokens - 1) / seconds["plain"])
        for name in ways:
            ratios[name].append(seconds["plain"] / seconds[name])
    result: dict[str, Any] = {"plain_tokens_per_second": statistics.median(rates), "same_tokens": same}
    for name, engine in ways.items():
        if name == "plain":
            continue
        result[name] = {
            "speed_up": statistics.median(ratios[name]),
            "spread": [min(ratios[name]), max(ratios[name])],
            "speed_up_first": ratios[name][0],
        }
        if engine.payoff is not None:
            accepted, guessed = engine.payoff.accepted, engine.payoff.guessed
            result[name] |= {"guessed": guessed, "acceptance": accepted / max(1, guessed)}
    return result


if __name__ == "__main__":
    main()
