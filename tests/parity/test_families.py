"""Every family against transformers, on a tiny random model: the anatomy, the walk through the blocks, and the tap."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.families import FAMILIES
from fettle.models.skeleton import Skeleton, Tap

from .conftest import Written
from .tiny_models import TINY, random_ids, reference_output

NAMES = sorted(TINY)
CAUSAL = sorted(set(NAMES) - {"bert", "bert-masked-lm"})
LENGTHS = (21, 9)


def build(written: Written, name: str) -> tuple[Skeleton, Anatomy, torch.nn.Module]:
    folder, model = written(name)
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint)
    return Skeleton.build(checkpoint, anatomy), anatomy, model


def through_blocks(skeleton: Skeleton, anatomy: Anatomy, hidden: list[Tensor]) -> list[Tensor]:
    for block in anatomy.blocks:
        skeleton.load_block(block.index)
        hidden = [skeleton.run_block(block.index, h) for h in hidden]
        skeleton.free_block(block.index)
    return hidden


def test_every_family_has_a_tiny_model() -> None:
    covered = {fields["model_type"] for _, fields in TINY.values()}
    assert covered == {model_type for family in FAMILIES for model_type in family.model_types}


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_equals_transformers(written: Written, name: str) -> None:
    skeleton, anatomy, model = build(written, name)
    windows = [random_ids(length, seed=length) for length in LENGTHS]
    hidden = through_blocks(skeleton, anatomy, [skeleton.embed(ids[None]) for ids in windows])
    for ids, last in zip(windows, hidden, strict=True):
        assert torch.equal(skeleton.output(last), reference_output(model, ids))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_loaded_block_takes_memory(written: Written, name: str) -> None:
    skeleton, anatomy, _ = build(written, name)
    everything = [skeleton.model, *skeleton._blocks]

    def real() -> set[str]:
        return {n for module in everything for n, p in module.named_parameters() if not p.is_meta}

    assert real() == set()
    skeleton.load_block(1)
    assert not any(p.is_meta for p in skeleton._blocks[1].parameters())
    assert all(p.is_meta for i in (0, 2) for p in skeleton._blocks[i].parameters())
    skeleton.free_block(1)
    assert real() == set()
    skeleton.embed(random_ids(7)[None])
    vocabulary = anatomy.embedding
    assert vocabulary is not None
    shapes = {tuple(p.shape) for p in skeleton.model.parameters() if not p.is_meta}
    assert vocabulary.shape not in shapes, "embedding stays on disk while rows of it are read"
    skeleton.free_head()
    assert real() == set()


@pytest.mark.parametrize("name", NAMES)
def test_the_anatomy_names_every_matrix_of_the_blocks(written: Written, name: str) -> None:
    folder, _ = written(name)
    checkpoint = Checkpoint.open(folder)
    anatomy = read_anatomy(checkpoint)
    outside = set(anatomy.tensors)
    matrices = {n for n, e in checkpoint.entries.items() if len(e.shape) == 2 and n not in outside}
    assert {linear.weight_name for linear in anatomy.linears()} == matrices
    assert outside | {n for block in anatomy.blocks for n in block.tensors} == set(checkpoint.entries)
    for linear in anatomy.linears():
        stored = checkpoint.entries[linear.weight_name].shape
        assert linear.shape == (tuple(reversed(stored)) if linear.slot.transposed else stored), linear.name


@pytest.mark.parametrize("name", NAMES)
def test_a_slot_gives_back_what_was_put_in_and_the_model_feels_it(written: Written, name: str) -> None:
    skeleton, anatomy, _ = build(written, name)
    hidden = skeleton.embed(random_ids(24, seed=5)[None])
    skeleton.load_block(0)
    before = skeleton.run_block(0, hidden)
    tap = Tap()
    skeleton.run_block(0, hidden, tap)
    for linear in anatomy.blocks[0].linears:
        original = skeleton.weight(linear)
        assert original.shape == linear.shape and original.is_contiguous()
        others = {o.name: skeleton.weight(o) for o in anatomy.blocks[0].linears if o != linear}
        skeleton.set_weight_(linear, original + 0.25)
        assert torch.equal(skeleton.weight(linear), original + 0.25)
        assert all(torch.equal(skeleton.weight(o), others[o.name]) for o in anatomy.blocks[0].linears if o != linear)
        changed = not torch.equal(skeleton.run_block(0, hidden), before)
        assert changed == (linear.input_group in tap.inputs or linear.role == "router"), linear.name
        skeleton.set_weight_(linear, original)
    assert torch.equal(skeleton.run_block(0, hidden), before)


def hooked_inputs(model: torch.nn.Module, anatomy: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    """input_group → inputs, by an independent way: hooks on modules, and for experts the router's own choices."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    modules = dict(model.named_modules())

    def note(group: str):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            groups[group].append(args[0].reshape(-1, args[0].shape[-1]))

        return hook

    seen = set()
    for linear in anatomy.linears():
        path = linear.slot.parameter.removesuffix(".weight")
        if linear.expert is None and linear.input_group not in seen:
            seen.add(linear.input_group)
            handles.append(modules[path].register_forward_pre_hook(note(linear.input_group)))
    for linear in anatomy.linears():
        if linear.role == "expert_down":
            experts = modules[linear.slot.parameter.rpartition(".")[0]]
            stem = linear.name.rpartition(".")[0]

            def hook(module, args, expert=linear.expert, stem=stem, down=linear.input_group):  # type: ignore[no-untyped-def]
                hidden, chosen, _ = args
                own = hidden[(chosen == expert).any(-1)]  # [the expert's tokens, hidden]
                if len(own):
                    groups[f"{stem}.gate_up"].append(own)
                    gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, -1)
                    groups[down].append(module.act_fn(gate) * up)

            handles.append(experts.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    return {group: torch.cat(parts) for group, parts in groups.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_tap_sees_what_hooks_see(written: Written, name: str) -> None:
    skeleton, anatomy, model = build(written, name)
    ids = random_ids(20, seed=3)
    expected = hooked_inputs(model, anatomy, ids)
    hidden, caught = skeleton.embed(ids[None]), {}
    for block in anatomy.blocks:
        skeleton.load_block(block.index)
        tap = Tap()
        hidden = skeleton.run_block(block.index, hidden, tap)
        caught.update(tap.inputs)
        skeleton.free_block(block.index)
    assert set(caught) == set(expected)
    for group, inputs in caught.items():
        assert inputs.shape == expected[group].shape, group
        torch.testing.assert_close(inputs.T @ inputs, expected[group].T @ expected[group], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_sees_its_own_tokens_only(written: Written, name: str) -> None:
    skeleton, anatomy, _ = build(written, name)
    hidden = skeleton.embed(random_ids(20, seed=3)[None])
    skeleton.load_block(0)
    tap = Tap()
    skeleton.run_block(0, hidden, tap)
    experts = [linear for linear in anatomy.blocks[0].linears if linear.role == "expert_down"]
    counts = [len(tap.inputs.get(linear.input_group, ())) for linear in experts]
    assert sum(counts) == 20 * 2, "each token goes to two experts"
    assert max(counts) < 20
    assert (
        len({linear.input_group for linear in anatomy.blocks[0].linears})
        == len(
            {(linear.role.replace("expert_up", "expert_gate"), linear.expert) for linear in anatomy.blocks[0].linears}
        )
        - 2
    ), "query, key and value share one group; so do an expert's gate and up"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_two_threads_get_their_own_inputs(written: Written, name: str) -> None:
    skeleton, _, _ = build(written, name)
    windows = [random_ids(11 + 2 * i, seed=i) for i in range(6)]
    hidden = [skeleton.embed(ids[None]) for ids in windows]
    skeleton.load_block(0)

    def run(h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tap = Tap()
        return skeleton.run_block(0, h, tap), tap.inputs

    alone = [run(h) for h in hidden]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for (output, inputs), (expected, seen) in zip(pool.map(run, hidden), alone, strict=True):
                assert torch.equal(output, expected)
                assert set(inputs) == set(seen)
                assert all(torch.equal(inputs[group], seen[group]) for group in inputs)


@pytest.mark.parametrize("name", CAUSAL)
def test_head_inputs_times_head_are_the_logits(written: Written, name: str) -> None:
    skeleton, anatomy, model = build(written, name)
    ids = random_ids(13, seed=8)
    (last,) = through_blocks(skeleton, anatomy, [skeleton.embed(ids[None])])
    assert anatomy.head is not None
    logits = skeleton.head_inputs(last) @ skeleton.weight(anatomy.head).T
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    torch.testing.assert_close(logits, reference_output(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "gpt2", "gpt_neox"])
def test_a_replaced_embedding_and_head_are_used(written: Written, name: str) -> None:
    skeleton, anatomy, _ = build(written, name)
    assert anatomy.embedding is not None and anatomy.head is not None
    ids = random_ids(6, seed=1)
    before = skeleton.embed(ids[None])
    skeleton.set_weight_(anatomy.embedding, skeleton.weight(anatomy.embedding) * 2)
    after = skeleton.embed(ids[None])
    assert not torch.equal(before, after)
    logits = skeleton.logits(after)
    skeleton.set_weight_(anatomy.head, skeleton.weight(anatomy.head) * 3)
    torch.testing.assert_close(skeleton.logits(after), logits * 3)
