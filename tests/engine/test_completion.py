"""Completion against transformers' own greedy search, and its ends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from fettle.engine.completion import complete, complete_with, stream_completion
from fettle.engine.prompts import end_tokens, prompt_ids
from fettle.engine.sampler import Sampling
from fettle.errors import NonFiniteError, UsageError
from fettle.models.loading import load

PROMPT = "def fox_1(the, dog):"


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> object:
    return load(tiny_llama)


def test_greedy_equals_transformers_token_for_token(loaded, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = prompt_ids(loaded.tokenizer, PROMPT)
    wanted = plain.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=1)[0, len(ids) :]
    made = complete_with(loaded, PROMPT, Sampling(), max_new_tokens=24)
    assert made.tokens == tuple(t for t in wanted.tolist() if t not in end_tokens(loaded))
    assert (
        made.text
        == loaded.tokenizer.decode(made.tokens, skip_special_tokens=True)
        == complete(loaded, PROMPT, max_new_tokens=24)
    )


def test_the_prompt_begins_with_one_bos(loaded) -> None:
    ids = prompt_ids(loaded.tokenizer, PROMPT)
    assert ids[0] == loaded.tokenizer.bos_token_id
    assert ids.count(loaded.tokenizer.bos_token_id) == 1


def test_an_empty_prompt_is_only_the_bos(loaded) -> None:
    assert prompt_ids(loaded.tokenizer, "") == [loaded.tokenizer.bos_token_id]


def test_the_pieces_are_the_text(loaded) -> None:
    pieces = list(stream_completion(loaded, PROMPT, Sampling(temperature=1.0, seed=3), max_new_tokens=24))
    assert "".join(pieces) == complete(loaded, PROMPT, max_new_tokens=24, temperature=1.0, seed=3)


def test_a_seed_draws_the_same_and_another_seed_does_not(loaded) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        return complete_with(loaded, PROMPT, Sampling(temperature=1.5, seed=seed), max_new_tokens=24).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_context_ends_a_completion(loaded) -> None:
    long = "fox " * 2000
    with pytest.raises(UsageError, match="context holds 512"):
        complete(loaded, long)
    room = 512 - len(prompt_ids(loaded.tokenizer, PROMPT))
    sampling = Sampling(temperature=1.0)
    made = complete_with(loaded, PROMPT, sampling, max_new_tokens=10_000)
    assert made.stopped in ("context", "end")
    assert len(made.tokens) == room or made.stopped == "end"


def test_max_new_tokens_ends_a_completion(loaded) -> None:
    made = complete_with(loaded, PROMPT, Sampling(), max_new_tokens=3)
    assert made.stopped == "end" or (made.stopped == "length" and len(made.tokens) == 3)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        complete(loaded, PROMPT, max_new_tokens=0)


def test_the_models_own_end_ends_a_completion(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()  # every logit equal: greedy takes token 0
    loaded.model.generation_config.eos_token_id = [0]
    made = complete_with(loaded, PROMPT, Sampling(), max_new_tokens=5)
    assert made.stopped == "end"
    assert made.tokens == ()


def test_a_damaged_model_is_named_not_completed(tiny_llama: Path) -> None:
    loaded = load(tiny_llama)
    with torch.no_grad():
        loaded.model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        complete(loaded, PROMPT)


def test_a_prompt_that_is_no_text_is_refused(loaded) -> None:
    with pytest.raises(UsageError, match=r"not UTF-8 text.*character 4"):
        complete(loaded, "def \udcff")


def test_a_model_without_a_tokenizer_says_so(loaded) -> None:
    with pytest.raises(UsageError, match="no tokenizer files"):
        complete(dataclasses.replace(loaded, tokenizer=None), PROMPT)


def test_a_tokenizer_of_another_model_is_told_as_evaluate_tells_it(loaded) -> None:
    def tokens(prompt: str) -> dict[str, list[int]]:
        return {"input_ids": [5, 320]}

    tokens.bos_token_id = None  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="token id 320 is outside the embedding of 320 rows"):
        complete(dataclasses.replace(loaded, tokenizer=tokens), PROMPT)


def test_a_model_without_a_head_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaModel"]}))
    with pytest.raises(UsageError, match="is a LlamaModel, which has no language-model head"):
        complete(load(tmp_path / "base"), PROMPT)
