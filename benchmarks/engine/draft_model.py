"""What a small draft model brings or costs, where how often it is right is planted.

    python benchmarks/engine/draft_model.py [--blocks 16 --tokens 128 --prompt 64 --repetitions 5 --agreement 0.9 0]

Random weights guess nothing, so the model is made to be guessed: TinyLlama-1.1B's shape with 4-bit codes, whose blocks
behind the first add exactly nothing, though they are computed, and whose attention adds nothing anywhere, since random
attention is another one for another beginning of the text, which a rehearsal leaves out. The draft is the first block
alone, which then is the model; a wrapper turns a share of its guesses wrong, 1 - agreement of them. Times are those
of real steps of the native engine, agreement is not a property of any real pair of models. Plain and drafted
generations take turns on the same prompts; a speed-up is the median of the repetitions' ratios of decoding time, each
repetition with an engine of its own, whose switch knows nothing yet; "later" are those of its second request. One JSON
line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import numpy as np
from native_llama import HIDDEN, MLP, PAGE, VOCABULARY, coded, make_table
from numpy.typing import NDArray

from fettle import Request, SchedulerOptions
from fettle.engine.engine import Engine
from fettle.engine.native_runner import NativeRunner
from fettle.engine.payoff import Payoff
from fettle.engine.runner import Batch, RunnerShape
from fettle.engine.speculative import DraftModel, scratch_pages
from fettle.kernels.native import plane

PAGES = 64


class Wrong(NativeRunner):
    """A runner whose likeliest token is another one at a share of the positions."""

    share = 0.0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().run(batch)
        for row, index in enumerate(batch.logit_rows):
            if np.random.default_rng(int(batch.positions[index])).random() < self.share:
                logits[row, (int(logits[row].argmax()) + 1) % VOCABULARY] = np.inf
        return logits


def open_pair(options: argparse.Namespace) -> tuple[NativeRunner, Wrong]:
    """The model and its draft, which share the memory of the first block, the embedding and the head."""
    pool = plane().Pool(options.threads)
    table = make_table(options, pool)
    codes = np.zeros(HIDDEN * MLP, np.uint8)
    for number, block in enumerate(table["blocks"]):
        block["output"] = coded(HIDDEN, HIDDEN, options, pool, codes, 0.0)
        if number:
            block["mlp"]["down"] = coded(HIDDEN, MLP, options, pool, codes, 0.0)

    def runner(kind: Any, blocks: int, pages: int) -> Any:
        decoder = plane().Decoder(table | {"blocks": table["blocks"][:blocks]}, pages, PAGE, "float16", pool, True)
        shape = RunnerShape(page_size=PAGE, pages=pages, page_bytes=decoder.page_bytes, vocab_size=VOCABULARY)
        return kind(decoder, shape, multiplies_bytes=True)

    return runner(NativeRunner, options.blocks, PAGES), runner(Wrong, 1, PAGES + scratch_pages(PAGE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("bits", 4),
        ("group-size", 32),
        ("blocks", 16),
        ("threads", 2),
        ("tokens", 128),
        ("prompt", 64),
        ("repetitions", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--agreement", type=float, nargs="+", default=[0.9, 0.0])
    options = parser.parse_args()
    model, draft = open_pair(options)
    alone = SchedulerOptions(max_sequences=1, reuse_prefixes=False)
    random = np.random.default_rng(0)
    requests = [
        Request(prompt=tuple(random.integers(0, VOCABULARY, options.prompt).tolist()), max_tokens=options.tokens)
        for _ in range(2)
    ]
    ways = ["plain", "plain_again", *(str(agreement) for agreement in options.agreement)]
    ratios: dict[str, list[list[float]]] = {way: [[], []] for way in ways}
    guesses = dict.fromkeys(ways, (0, 0))
    for repetition in range(options.repetitions):
        engines = {way: Engine(model, options=alone) for way in ways[:2]}
        for way in ways[2:]:
            engines[way] = Engine(model, options=alone, drafter=DraftModel(draft, model), payoff=Payoff())
        for place, request in enumerate(requests):
            order = ways[repetition % len(ways) :] + ways[: repetition % len(ways)]
            seconds, tokens = {}, set()
            for way in order:
                draft.share = 0.0 if way in ways[:2] else 1 - float(way)
                made = engines[way].generate([request])[0]
                seconds[way] = made.decode_seconds
                tokens.add(made.tokens)
            assert len(tokens) == 1, "guessing changed a token"
            for way in ways:
                ratios[way][place].append(seconds["plain"] / seconds[way])
        guesses = {way: (e.payoff.guessed, e.payoff.accepted) for way, e in engines.items() if e.payoff is not None}
    found: dict[str, Any] = {
        "benchmark": "engine/draft_model", "blocks": options.blocks, "tokens": options.tokens, "prompt": options.prompt,
        "tokens_per_second": (options.tokens - 1) / seconds["plain"],
    }  # fmt: skip
    for way in ways[1:]:
        first, later = ratios[way]
        found[way] = {
            "speed_up": statistics.median(first), "spread": [min(first), max(first)],
            "speed_up_later": statistics.median(later), "spread_later": [min(later), max(later)],
            "guessed_accepted": guesses.get(way),
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
