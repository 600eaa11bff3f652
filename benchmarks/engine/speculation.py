"""What guessing tokens brings: prompt look-up and a 2-bit draft, on text that repeats itself and on text that does not.

python benchmarks/engine/speculation.py [MODEL] [--engine torch] [--tokens 192] [--repetitions 5]

The draft is the model itself, rounded to 2 bits. "repetitive": greedy completions of code that repeats itself.
"varied": draws at temperature 1.2, where hardly any guess is right. Plain, look-up and draft take turns at each
request, in another order each time; a speed-up is the median of the repetitions' ratios of decoding time. The tokens
must be equal. "plain_again" is the same as plain and says what the machine's noise does. `--always` adds ways that
guess in every step, whether it pays or not. One JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import fettle
from fettle import Request, RunnerOptions, Sampling, SchedulerOptions
from fettle.engine.engine import Engine
from fettle.engine.payoff import Payoff
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
        options = RunnerOptions(cache_tokens=1024)
        target = open_engine(asked.model, engine=asked.engine, runner=options)
        runner, vocabulary = target.runner, target.vocabulary
        # The engines take turns on one runner: what one of them left in a page, another has overwritten.
        alone = SchedulerOptions(max_sequences=1, reuse_prefixes=False)
        drafters = {
            name: open_drafter(what, runner, asked.engine, options)
            for name, what in (("lookup", LOOKUP), ("draft", draft))
        }
        for text, prompts in PROMPTS.items():
            sampling = Sampling() if text == "repetitive" else Sampling(temperature=1.2, seed=7)
            requests = [
                Request(prompt=target.encode(prompt), max_tokens=asked.tokens, sampling=sampling, ignore_end=True)
                for prompt in prompts
            ]
            ways = {name: Engine(runner, vocabulary, alone) for name in ("plain", "plain_again")}
            for name, drafter in drafters.items():
                for kind, payoff in (("", Payoff(asked.guesses)), ("_always", Always(asked.guesses))):
                    if kind and not asked.always:
                        continue
                    ways[name + kind] = Engine(runner, vocabulary, alone, drafter=drafter, payoff=payoff)
            found[text] = compare(ways, requests, asked.repetitions)
    print(json.dumps(found))


def compare(ways: dict[str, Engine], requests: list[Request], repetitions: int) -> dict[str, Any]:
    """Speed-up over plain, acceptance and whether the tokens are the same, by way of guessing."""
    ways["plain"].generate([dataclasses.replace(requests[0], max_tokens=16)])
    seconds = {name: [0.0] * repetitions for name in ways}
    tokens: dict[str, list[tuple[int, ...]]] = {}
    names = list(ways)
    for repetition in range(repetitions):
        tokens = {name: [] for name in ways}
        for request in requests:
            names = [*names[1:], names[0]]
            for name in names:
                made = ways[name].generate([request])[0]
                seconds[name][repetition] += made.decode_seconds
                tokens[name].append(made.tokens)
    result: dict[str, Any] = {
        "plain_tokens_per_second": sum(map(len, tokens["plain"])) / statistics.median(seconds["plain"])
    }
    for name, engine in ways.items():
        if name == "plain":
            continue
        ratios = [plain / took for plain, took in zip(seconds["plain"], seconds[name], strict=True)]
        result[name] = {
            "speed_up": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "same_tokens": tokens[name] == tokens["plain"],
        }
        if engine.payoff is not None:
            accepted, guessed = engine.payoff.accepted, engine.payoff.guessed
            result[name] |= {"guessed": guessed, "acceptance": accepted / max(1, guessed)}
    return result


if __name__ == "__main__":
    main()
