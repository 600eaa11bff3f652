"""A rotated model is the same function, in every family that can be rotated; each rotated tensor is needed for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.quantize.rotation import Rotation
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.rotated import RotatedCheckpoint, rotate
from fettle.models.skeleton import Skeleton

from .conftest import Written
from .tiny_models import COMMON, TINY, random_ids, reference_output

IDS = random_ids(40)
REFUSED = {
    "gemma2": "norms behind attention and MLP", "bert": "in the residual stream itself",
    "bert-masked-lm": "in the residual stream itself",
}  # fmt: skip
WHOLE = sorted(set(TINY) - set(REFUSED))
CENTRED = {"gpt2", "gpt_neo", "gpt_neox"}


def outputs(checkpoint: Checkpoint) -> Tensor:
    """What the model gives out for the test's tokens, block by block."""
    anatomy = read_anatomy(checkpoint)
    skeleton = Skeleton.build(checkpoint, anatomy)
    hidden = skeleton.embed(IDS[None])
    for block in anatomy.blocks:
        skeleton.load_block(block.index)
        hidden = skeleton.run_block(block.index, hidden)
        skeleton.free_block(block.index)
    return skeleton.output(hidden)


def rotated(folder: Path, **fields: object) -> RotatedCheckpoint:
    checkpoint = Checkpoint.open(folder)
    return rotate(checkpoint, read_anatomy(checkpoint), Rotation(**fields))  # type: ignore[arg-type]


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", WHOLE)
def test_a_rotated_model_is_the_same_function(written: Written, name: str) -> None:
    folder, model = written(name)
    expected, plain = reference_output(model, IDS), Checkpoint.open(folder)
    turned = rotated(folder, seed=7)
    assert distance(outputs(turned), expected) < 1e-5
    anatomy = read_anatomy(turned)
    assert not anatomy.tied
    if read_anatomy(plain).tied:
        assert turned.config["tie_word_embeddings"] is False
    for linear in anatomy.linears():
        touched = not torch.equal(turned.read(linear.weight_name), plain.read(linear.weight_name))
        assert touched, f"{linear.name} is as it was"
    assert set(turned.read(f"{anatomy.residual.final}.weight").tolist()) == {1.0}  # type: ignore[union-attr]
    assert anatomy.residual.centred == (name in CENTRED)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", sorted(TINY))
def test_heads_alone_can_be_rotated_in_every_family(written: Written, name: str) -> None:
    folder, model = written(name)
    turned = rotated(folder, residual=False)
    assert distance(outputs(turned), reference_output(model, IDS)) < 1e-5
    anatomy = read_anatomy(turned)
    plain = Checkpoint.open(folder)
    roles = {x.role for x in anatomy.linears()}
    names = {x.weight_name: x.role for x in anatomy.linears()}
    changed = {role for name, role in names.items() if not torch.equal(turned.read(name), plain.read(name))}
    assert changed == {"output", "query_key_value" if "query_key_value" in roles else "value"}
    assert anatomy.tied == read_anatomy(plain).tied


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_cannot_be_rotated_is_refused_with_a_reason(written: Written, name: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        rotated(written(name)[0])


def test_a_model_without_a_head_or_a_table_is_refused(written: Written, tmp_path: Path) -> None:
    folder, model = written("llama")
    model.model.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    with pytest.raises(RecipeError, match="without a head, the residual stream is what the model gives out"):
        rotated(tmp_path)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(RecipeError, match="nothing is known of the residual stream of this generic model"):
        rotate(checkpoint, read_anatomy(checkpoint, generic=True), Rotation())


@pytest.mark.parametrize(
    ("hidden", "head_dim"), [(24, 6), (40, 10), (48, 12), (96, 20), (36, 18), (28, 14), (44, 28), (12, 6)]
)
def test_any_even_width_and_head_size(tmp_path: Path, hidden: int, head_dim: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(hidden)
    config = LlamaConfig(**{**COMMON, "hidden_size": hidden, "head_dim": head_dim, "num_hidden_layers": 2})
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert distance(outputs(rotated(tmp_path)), reference_output(model, IDS)) < 1e-5


def test_an_odd_width_is_refused_and_an_odd_head_left_alone(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    for width, heads in ((35, 5), (36, 12)):
        config = GPT2Config(vocab_size=96, n_embd=width, n_head=heads, n_layer=1, n_positions=64)
        model = GPT2LMHeadModel(config).eval()
        model.save_pretrained(tmp_path / str(width))
        if width % 2:
            with pytest.raises(RecipeError, match="35 channels, and no Hadamard matrix divides an odd number"):
                rotated(tmp_path / str(width))
        else:
            turned = rotated(tmp_path / str(width))
            assert distance(outputs(turned), reference_output(model, IDS)) < 1e-5
            assert all(change.columns is None or change.columns.width == width for change in turned.changes.values())


@pytest.mark.parametrize(
    "name",
    [
        "llama-tied-biased", "gpt2",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("phi3", "gpt_neo", "gpt_neox", "mixtral")),
    ],
)  # fmt: skip
def test_a_planted_omission_is_seen_whichever_tensor_is_forgotten(written: Written, name: str) -> None:
    """A writer, a reader, a norm, a bias, a router: where one alone stays as it was, the logits are others."""
    folder, _ = written(name)
    turned, plain = rotated(folder), Checkpoint.open(folder)
    expected, blocks = outputs(turned), read_anatomy(turned).blocks
    others = {tensor for block in (blocks[0], blocks[2]) for tensor in block.tensors}
    for tensor in set(turned.changes) & set(plain.entries) - others:
        kept = {key: change for key, change in turned.changes.items() if key != tensor}
        assert distance(outputs(replace(turned, changes=kept)), expected) > 1e-4, f"{tensor} may be forgotten"


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox"])
def test_a_planted_wrong_index_in_the_head_rotation_is_seen(written: Written, name: str) -> None:
    folder, model = written(name)
    turned = rotated(folder, residual=False)
    tensors = read_anatomy(turned).blocks[1].tensors
    (values,) = (n for n in tensors if n.endswith("weight") and n in turned.changes and turned.changes[n].chosen)
    change = turned.changes[values]
    assert change.chosen is not None
    shifted = (*change.chosen[1:], change.chosen[0])
    broken = replace(turned, changes={**turned.changes, values: replace(change, chosen=shifted)})
    assert distance(outputs(turned), reference_output(model, IDS)) < 1e-5
    assert distance(outputs(broken), reference_output(model, IDS)) > 1e-4


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "gpt2"])
def test_a_planted_wrong_sign_is_seen_in_every_tensor(written: Written, name: str, side: str) -> None:
    """One sign of one tensor's matrix is turned: what it reads or writes no longer fits what all others do."""
    folder, _ = written(name)
    turned = rotated(folder)
    expected, block = outputs(turned), read_anatomy(turned).blocks[1]
    tensors = [tensor for tensor in block.tensors if getattr(turned.changes.get(tensor), side, None) is not None]
    assert tensors
    for tensor in tensors:
        change = turned.changes[tensor]
        matrix = getattr(change, side)
        signs = matrix.signs.clone()
        signs[3] *= -1
        broken = replace(change, **{side: replace(matrix, signs=signs)})
        found = outputs(replace(turned, changes={**turned.changes, tensor: broken}))
        assert distance(found, expected) > 1e-4, f"a wrong sign in the {side} of {tensor} is not seen"


def test_rows_are_read_as_the_whole_is(written: Written) -> None:
    for name in ("llama-tied-biased", "gpt2"):
        turned = rotated(written(name)[0])
        for tensor in turned.changes:
            assert torch.equal(turned.read_rows(tensor, 1, 3), turned.read(tensor)[1:3]), tensor


def test_a_norm_with_a_zero_cannot_give_its_bias_away(tmp_path: Path, written: Written) -> None:
    _, model = written("gpt2")
    from transformers import GPT2LMHeadModel

    other = GPT2LMHeadModel(model.config)  # type: ignore[arg-type]
    with torch.no_grad():
        other.transformer.h[0].ln_1.weight[3] = 0
    other.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"ln_1\.weight holds a zero"):
        outputs(rotated(tmp_path))
