"""Searched layer maps, against transformers' own model with blocks taken out, and what they say."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fettle.data.tokenizer import load_tokenizer
from fettle.data.windows import calibration_windows
from fettle.errors import RecipeError
from fettle.methods.train.layer_search import Chosen, choose_blocks
from fettle.methods.train.options import LoopFields
from fettle.methods.train.text_mix import learning_part
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import load


@pytest.fixture(scope="module")
def five_blocks(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A random Llama of 5 blocks, whose third hardly does anything."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "five"
    AutoTokenizer.from_pretrained(str(tiny_llama)).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in (model.model.layers[2].self_attn.o_proj.weight, model.model.layers[2].mlp.down_proj.weight):
            weight.mul_(0.01)
    model.save_pretrained(folder)
    return folder


def loss(folder: Path, kept: tuple[int, ...], windows: torch.Tensor) -> float:
    model = load(folder).model
    model.model.layers = torch.nn.ModuleList([model.model.layers[block] for block in kept])
    model.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_the_map_by_loss_is_greedy_removal_by_transformers(five_blocks: Path, text_file: Path) -> None:
    fields = LoopFields(text=str(text_file), length=32)
    checkpoint = Checkpoint.open(five_blocks)
    found = choose_blocks("loss", 3, checkpoint, read_anatomy(checkpoint), fields, "cpu")
    drawn = calibration_windows(load_tokenizer(five_blocks), learning_part(fields), windows=16, length=32, seed=0)
    windows, kept = torch.stack(list(drawn.ids)), tuple(range(5))
    for told in found.scores:
        smaller = list(itertools.combinations(kept, len(kept) - 1))
        losses = [loss(five_blocks, blocks, windows) for blocks in smaller]
        kept = smaller[losses.index(min(losses))]
        assert told == pytest.approx(min(losses), rel=1e-4)
    assert found.kept == list(kept)


def test_a_block_that_does_little_goes_first(five_blocks: Path, text_file: Path) -> None:
    checkpoint = Checkpoint.open(five_blocks)
    found = choose_blocks(
        "influence", 4, checkpoint, read_anatomy(checkpoint), LoopFields(text=str(text_file), length=32), "cpu"
    )
    assert found.kept == [0, 1, 3, 4]
    assert min(found.scores) == found.scores[2] < 0.01
    assert found.looked_at() == [0, 2, 3, 4]  # the second kept block does the work of the two before the third


def test_a_map_that_is_not_searched_looks_at_the_kept_blocks() -> None:
    assert Chosen(map="uniform", kept=[1, 3, 5], blocks=6).looked_at() == [1, 3, 5]
    assert Chosen(map="loss", kept=[0, 1, 5], blocks=6).looked_at() == [0, 4, 5]


def test_more_layers_than_there_are_are_refused(five_blocks: Path, text_file: Path) -> None:
    checkpoint = Checkpoint.open(five_blocks)
    with pytest.raises(RecipeError, match="allowed: 1 to 5 layers"):
        choose_blocks("loss", 6, checkpoint, read_anatomy(checkpoint), LoopFields(text=str(text_file)), "cpu")
