"""What several rooms' tests share: a tiny random Llama with a tokenizer, and a text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once instead of downloading

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
    "odd",
    "potions",
    "from",
    "green",
    "bottles",
    "and",
    "sing",
]


def sample_text(lines: int) -> str:
    """Deterministic text with some structure: enough for windows, small enough for seconds."""
    made = []
    for number in range(lines):
        picked = [WORDS[(number * 7 + step * step * 3 + step) % len(WORDS)] for step in range(5 + number % 7)]
        made.append(f"def {picked[0]}_{number}({picked[1]}, {picked[2]}):\n    return {' + '.join(picked[3:])}\n")
    return "\n".join(made)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTF-8 text of some 20 kB."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(250), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a random bf16 Llama: 2 blocks, hidden 64, MLP 172 (not a multiple of 32)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([sample_text(100)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def few_tokens_measured() -> Iterator[None]:
    """`compress` and `train` measure what they wrote on 1,024 tokens instead of 16,384, and a budget's search looks at
    512 instead of 4,096: the same path, in a second.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in ("compressing", "training"):
            patch.setattr(f"fettle.api.{module}.EVALUATION_TOKENS", 1024)
        patch.setattr("fettle.search.choose.SAMPLE_TOKENS", 512)
        yield
