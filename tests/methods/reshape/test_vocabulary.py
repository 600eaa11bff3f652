"""Trimming the vocabulary: the same text is cut as before, any text can be written, and logits are the kept rows'."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parity.tiny_models import reference_output
from transformers import AutoTokenizer, LlamaForCausalLM

import fettle
from fettle.api import compressing
from fettle.data.tokenizer import load_tokenizer
from fettle.errors import RecipeError
from fettle.methods.registry import from_fields
from fettle.methods.reshape.trimmed_tokenizer import kept_tokens, renumbered, trim_files
from fettle.methods.reshape.vocabulary import TrimVocabulary
from fettle.pipeline.recipe import parse_recipe

from .written import output_of_files, subject_of, tiny_subject, write_view

TEXT = "def quick_1(brown, fox):\n    return jumps + over + a\n\ndef the_2(lazy, dog):\n    return the\n"


@pytest.fixture(scope="module")
def trimmed(tiny_llama, tmp_path_factory):
    """The written folder, and the kept ids in their order."""
    folder = tmp_path_factory.mktemp("trimmed")
    (folder / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    recipe = parse_recipe(
        {
            "name": "trim", "calibration": {"windows": 2, "length": 32, "text": str(folder / "text.txt")},
            "steps": [{"method": "trim_vocabulary"}, {"method": "round_to_nearest", "bits": 8}],
        },
        "test",
    )  # fmt: skip
    made = fettle.compress(tiny_llama, folder / "out", recipe, evaluate=True)
    files = {"tokenizer.json": json.loads((tiny_llama / "tokenizer.json").read_text())}
    used = set(AutoTokenizer.from_pretrained(tiny_llama)(TEXT * 3, add_special_tokens=False)["input_ids"])
    return made, kept_tokens(files["tokenizer.json"], used, 320)


def test_the_text_in_use_is_cut_as_before(trimmed, tiny_llama):
    made, kept = trimmed
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_llama, made.folder))
    old, new = (tokenizer(TEXT, add_special_tokens=False)["input_ids"] for tokenizer in (before, after))
    assert [kept[token] for token in new] == old
    assert len(after) == len(kept) < 320
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)
    assert kept[after.bos_token_id] == before.bos_token_id


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_can_still_be_written(trimmed, text):
    made, _ = trimmed
    tokenizer = load_tokenizer(made.folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_logits_are_the_originals_of_the_kept_tokens(tiny_llama, tmp_path):
    (subject,) = (subject_of(tiny_llama),)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    used = sorted(set(tokenizer(TEXT, add_special_tokens=False)["input_ids"]))
    view = TrimVocabulary().reshape(dataclasses.replace(subject, used_tokens=lambda: used)).view
    kept = kept_tokens(json.loads((tiny_llama / "tokenizer.json").read_text()), used, 320)
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    new = torch.tensor([kept.index(int(token)) for token in ids])
    found = output_of_files(write_view(view, tmp_path / "out"), new)
    torch.testing.assert_close(found, reference_output(model, ids)[..., kept], atol=1e-5, rtol=1e-4)


def test_it_is_measured_by_the_byte(trimmed, tiny_llama):
    made, kept = trimmed
    config = json.loads((made.folder / "config.json").read_text())
    assert config["vocab_size"] == len(kept)
    assert made.evaluation.kl_mean is None and made.evaluation.reference_bits_per_byte is not None
    alone = fettle.evaluate(tiny_llama, length=512, max_tokens=compressing.EVALUATION_TOKENS)
    assert made.evaluation.reference_bits_per_byte == alone.bits_per_byte
    assert isinstance(fettle.generate(made.folder, "def quick", max_new_tokens=4), str)


def test_templates_and_settings_get_the_new_numbers():
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5, "ca": 6},
                  "merges": ["a b", "c a", "ab c"]},
        "added_tokens": [{"id": 0, "content": "<s>"}],
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            {"type": "RobertaProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0]}]},
    }  # fmt: skip
    kept = kept_tokens(tokenizer, [5], 7)
    assert kept == [0, 1, 2, 3, 4, 5]  # abc is made by way of ab
    new = {old: place + 10 for place, old in enumerate(kept)}
    files = trim_files({"tokenizer.json": tokenizer, "generation_config.json": {"eos_token_id": [0, 6]}}, new)
    found = json.loads(files["tokenizer.json"])
    assert found["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert found["model"]["vocab"] == {"<s>": 10, "a": 11, "b": 12, "c": 13, "ab": 14, "abc": 15}
    template, pair = found["post_processor"]["processors"]
    assert template["special_tokens"]["<s>"]["ids"] == [10] and pair["sep"] == ["<s>", 10]
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [10]}
    assert renumbered({"bos_token_id": 0, "pad_token_id": 6, "eos_token_id": None, "n": 3}, new) == {
        "bos_token_id": 10, "pad_token_id": None, "eos_token_id": None, "n": 3,
    }  # fmt: skip


def test_what_cannot_be_trimmed_is_refused(tiny_llama, tmp_path):
    with pytest.raises(RecipeError, match="only byte-pair tokenizers"):
        kept_tokens({"model": {"type": "WordPiece"}}, [], 3)
    _, bare = tiny_subject("llama", tmp_path / "bare")
    with pytest.raises(RecipeError, match=r"has no tokenizer\.json"):
        from_fields("trim_vocabulary", {}).reshape(bare)
    everything = dataclasses.replace(subject_of(tiny_llama), used_tokens=lambda: list(range(320)))
    with pytest.raises(RecipeError, match="uses every token"):
        TrimVocabulary().reshape(everything)
