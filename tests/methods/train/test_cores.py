"""Cores between frozen bases: the gradient by brute force, few numbers learn, PEFT reads what is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.apart import run_apart

import fettle
from fettle.data.windows import calibration_windows
from fettle.errors import RecipeError, ResumeError, UsageError
from fettle.methods.train import Adapter
from fettle.methods.train import curve as curve_module
from fettle.methods.train.adapter_targets import module_path, parsed_ranks, parsed_roles, target_linears
from fettle.methods.train.adapters import load_adapters, merge_adapter
from fettle.methods.train.cores import BASES, GRADIENT_WINDOWS, bases, loss_gradients, main_directions
from fettle.methods.train.curve import Curve
from fettle.methods.train.job import TrainJob
from fettle.methods.train.options import LoopFields
from fettle.methods.train.text_mix import learning_part, training_text
from fettle.methods.train.training import train
from fettle.models.loading import load

from .conftest import SMALL

pytest.importorskip("peft")

Trained = Callable[..., tuple[Path, Curve]]
HOW = {"steps": 6, "learning_rate": 2e-2, "keep": "last"}
EVERYWHERE = {"targets": "all,head,embedding", "ranks": "head=6,embedding=5", "rank": 3, "alpha": 3.0}


@pytest.fixture(scope="module")
def tied_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def test_words_of_targets_and_ranks() -> None:
    assert parsed_roles("mlp, head") == ("gate", "up", "down", "gate_up", "head")
    assert "head" not in parsed_roles("all")
    assert parsed_ranks("mlp=2, up=3,head=4") == {"gate": 2, "up": 3, "down": 2, "gate_up": 2, "head": 4}
    assert parsed_ranks(None) == {}
    for wrong in ("head", "head=0", "head=x", "crown=2"):
        with pytest.raises(RecipeError, match=r"ranks.*allowed"):
            parsed_ranks(wrong)
    with pytest.raises(RecipeError, match="names head, which targets leaves out; allowed here: gate"):
        Adapter(targets="mlp", ranks="head=2").validate()


def test_gradients_are_those_of_the_matrices(tied_llama: Path, text_file: Path) -> None:
    """By autograd on the weights themselves; the tied head and the embedding each have their own share."""
    fields = LoopFields(text=str(text_file), length=SMALL["length"])
    loaded = load(tied_llama)
    linears = target_linears(loaded, parsed_roles("all,head,embedding"))
    found = loss_gradients(loaded, linears, fields)
    assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())
    tree = load(tied_llama).model.requires_grad_(True)
    part = learning_part(fields)
    for ids in calibration_windows(loaded.tokenizer, part, windows=GRADIENT_WINDOWS, length=fields.length, seed=0).ids:
        logits = tree(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:]).backward()
    for linear in loaded.anatomy.linears():
        expected = tree.get_submodule(module_path(linear)).weight.grad
        assert torch.allclose(found[module_path(linear)], expected, atol=1e-4 * float(expected.abs().max())), linear
    shared = tree.get_input_embeddings().weight.grad
    parts = {x.role: found[module_path(x)] for x in (loaded.anatomy.head, loaded.anatomy.embedding) if x is not None}
    total = parts["head"] + parts["embedding"].T
    assert torch.allclose(total, shared, atol=1e-4 * float(shared.abs().max()))


def test_main_directions_are_the_singular_ones() -> None:
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(40, 40))
    right, _ = torch.linalg.qr(torch.randn(30, 30))
    matrix = left[:, :30] * (0.5 ** torch.arange(30)) @ right.T
    u, s, v = main_directions(matrix, 4)
    assert torch.allclose(s, 0.5 ** torch.arange(4.0), atol=1e-5)
    assert torch.allclose((u * s) @ v, (left[:, :4] * s) @ right[:, :4].T, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora_sb", pytest.param("lora_xs", marks=pytest.mark.exhaustive)])
def test_cores_alone_learn_and_peft_reads_them(kind: str, tiny_llama: Path, trained: Trained, text_file: Path) -> None:
    output, curve = trained(Adapter, tiny_llama, kind=kind, **HOW, **EVERYWHERE)
    assert curve.held_back[-1][1] < curve.held_back[0][1]
    loaded = load(tiny_llama)
    linears = sum(1 for _ in loaded.anatomy.linears())
    record = json.loads((output / "fettle_adapter.json").read_text())
    assert record["parameters"] == 9 * linears + 36 + 25
    stored = load_file(output / "adapter_model.safetensors")
    held = load_file(output.with_suffix(".run") / BASES)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    assert torch.equal(stored[f"{key}.lora_A.weight"], held["model.layers.0.self_attn.q_proj.right"])
    left = held["model.layers.0.self_attn.q_proj.left"]
    inside = left @ torch.linalg.lstsq(left, stored[f"{key}.lora_B.weight"]).solution
    assert torch.allclose(stored[f"{key}.lora_B.weight"], inside, atol=1e-6)
    assert stored["base_model.model.lm_head.lora_A.weight"].shape[0] == 6
    assert float(stored["base_model.model.model.embed_tokens.lora_embedding_B"].abs().max()) > 0
    text = training_text(loaded.tokenizer, LoopFields(**{**SMALL, "text": str(text_file)}))
    adapted, windows = load_adapters(loaded, {"mine": output}), text.ids[text.held_back]
    with torch.no_grad():
        logits = adapted(input_ids=windows, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert float(loss) == pytest.approx(curve.held_back[-1][1], rel=1e-4)


def test_cores_learn_beside_codes(tiny_llama: Path, trained: Trained, tmp_path: Path) -> None:
    from fettle.pipeline.recipe import parse_recipe

    step = {"method": "round_to_nearest", "bits": 4, "group_size": 32}
    fettle.compress(
        tiny_llama, tmp_path / "packed", parse_recipe({"name": "packed", "steps": [step]}, "test"), evaluate=False
    )
    _, curve = trained(Adapter, tmp_path / "packed", tiny_llama, kind="lora_sb", rank=4, alpha=4.0, **HOW)
    assert curve.held_back[-1][1] < curve.held_back[0][1]


def test_a_tied_matrix_is_not_merged(tied_llama: Path, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="share one matrix"):
        trained(Adapter, tied_llama, **HOW, targets="mlp,head", rank=1, merge=True)
    output, _ = trained(Adapter, tied_llama, **HOW, targets="mlp,head", rank=1)
    with pytest.raises(UsageError, match="share one matrix"):
        merge_adapter(tied_llama, output, tmp_path / "merged")


def test_a_resumed_run_takes_the_bases_that_it_began_with(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    loaded = load(tiny_llama)
    linears = [(linear, 2) for linear in target_linears(loaded, ("query",))]
    fields = LoopFields(text=str(text_file), length=SMALL["length"])
    first = bases(loaded, linears, "lora_sb", fields, tmp_path / "run")
    before = (tmp_path / "run" / BASES).stat().st_mtime_ns
    again = bases(loaded, linears, "lora_sb", fields, tmp_path / "run")
    assert (tmp_path / "run" / BASES).stat().st_mtime_ns == before
    for path, (left, right) in first.items():
        assert torch.equal(left, again[path][0])
        assert torch.equal(right, again[path][1])
    whole = (tmp_path / "run" / BASES).read_bytes()
    for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (tmp_path / "run" / BASES).write_bytes(damaged)
        with pytest.raises(ResumeError, match=r"bases.safetensors is damaged.*--fresh"):
            bases(loaded, linears, "lora_sb", fields, tmp_path / "run")


def adapt_until(model: Path, text: Path, output: Path, kind: str, killed: str) -> None:
    """Trains an adapter; a kill comes before the mark of the checkpoint `killed`."""
    write_json = curve_module.write_json

    def kill_at_the_mark(path: Path, content: object) -> None:
        if path.parent.name == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, content)

    curve_module.write_json = kill_at_the_mark
    method = Adapter(**{**SMALL, **HOW, "checkpoint_every": 2}, text=str(text), kind=kind, targets="query,head", rank=3)
    train(method, TrainJob(model=model, original=model, output=output, folder=output.with_suffix(".run")))


@pytest.mark.parametrize("kind", ["lora_sb", pytest.param("lora_xs", marks=pytest.mark.exhaustive)])
def test_a_killed_run_gives_the_same_bytes(kind: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Each run in a process of its own, whose sets have an order of their own."""
    for name, killed in (("whole", "nothing"), ("torn", "checkpoint-4"), ("torn", "nothing")):
        ended = run_apart(adapt_until, tiny_llama, text_file, tmp_path / name, kind, killed, folder=tmp_path)
        assert ended.code == (0 if killed == "nothing" else -signal.SIGKILL), ended.said
        assert (tmp_path / name).exists() == (killed == "nothing")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "whole").iterdir()}
    assert "adapter_model.safetensors" in files
    assert files == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "torn").iterdir()}


def test_bases_of_another_kind_rank_or_seed_are_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    loaded = load(tiny_llama)
    linears = [(linear, 2) for linear in target_linears(loaded, ("query",))]
    fields = LoopFields(text=str(text_file), length=SMALL["length"])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    bases(loaded, linears, "lora_xs", fields, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own chance
    other = LoopFields(text=str(text_file), length=SMALL["length"], seed=1)
    wider = [(linear, 3) for linear, _ in linears]
    for told, asked in (("seed", (linears, "lora_xs", other)), ("ranks", (wider, "lora_xs", fields)),
                        ("kind", (linears, "lora_sb", fields))):  # fmt: skip
        with pytest.raises(UsageError, match=rf"the bases of another training \({told} differ\); use another output"):
            bases(loaded, *asked, tmp_path)


def test_directions_are_those_of_the_gradients_signs_or_of_the_weight(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Projecting on U and V keeps of the source what its best approximation of that rank keeps; Σ stands in U."""
    loaded = load(tiny_llama)
    linears = [(linear, 4) for linear in target_linears(loaded, ("query",))]
    fields = LoopFields(text=str(text_file), length=SMALL["length"])
    gradients = loss_gradients(loaded, [linear for linear, _ in linears], fields)
    for kind in ("lora_sb", "lora_xs"):
        for path, (left, right) in bases(loaded, linears, kind, fields, tmp_path / kind).items():
            weight = loaded.model.get_submodule(path).weight.detach().float()
            source = gradients[path].sign() if kind == "lora_sb" else weight
            sizes = torch.linalg.svdvals(source)[:4]
            along = left / left.norm(dim=0)
            assert (along.T @ source @ right.T).norm() == pytest.approx(float(sizes.norm()), rel=0.03)
            expected = sizes if kind == "lora_xs" else torch.ones(4)
            assert torch.allclose(left.norm(dim=0), expected, rtol=0.05)
