"""A model shared out among processes: parts in each, the curve and the result of one process, whole checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.apart import ROOT, run_together

import fettle
from fettle.errors import RecipeError, UsageError
from fettle.methods.train import TRAIN_METHODS, loop
from fettle.methods.train import curve as curve_module
from fettle.methods.train.curve import Curve, checkpoints
from fettle.methods.train.job import TrainJob
from fettle.methods.train.sharding import ASKED, MOMENTS, is_asked, own, read_moments, shard_, write_moments
from fettle.methods.train.training import train
from fettle.pipeline.recipe import parse_recipe

HOW: dict[str, Any] = {
    "steps": 4, "windows": 12, "length": 32, "batch_windows": 4, "look_every": 2, "checkpoint_every": 2, "held_back": 2,
    "learning_rate": 3e-3, "accumulate": 2, "warmup": 0.2,
}  # fmt: skip
SHALLOW: dict[str, Any] = {"layers": 1, "steps": None, "minutes": 1.0}  # of four steps, by the clock below
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "features, blocks again": ("distill", SHALLOW | {"features": 1.0, "gradient_checkpointing": True}),
    "values alone": ("distill", SHALLOW | {"values": 1.0, "soft": 0.0, "keep": "last"}),
    "bfloat16": ("distill", SHALLOW | {"precision": "bfloat16"}),
    "qat": ("qat", {"bits": 4, "granularity": "group", "group_size": 32}),
    "stored input scales": ("qat", {"bits": 8, "group_size": None, "activations": "static"}),
    "ternary": ("qat", {"grid": "ternary", "granularity": "tensor"}),
    "lora": ("adapter", {"rank": 4, "targets": "all,head,embedding"}),
    "dora, merged": ("adapter", {"kind": "dora", "rank": 4, "merge": True}),
    "cores": ("adapter", {"kind": "lora_xs", "rank": 8}),
    "bottleneck": ("adapter", {"kind": "bottleneck"}),
    "prompt": ("adapter", {"kind": "prompt"}),
    "prefix": ("adapter", {"kind": "prefix"}),
    "ia3": ("adapter", {"kind": "ia3"}),
    "movement": ("sparse", {"score": "movement", "mask_every": 2}),
    "regrowth": ("sparse", {"score": "taylor", "regrow": 0.3, "hard": 1.0, "soft": 0.0, "mask_every": 2}),
}
LAUNCHED = """
import sys
from pathlib import Path
from tests.methods.train.test_sharding import train_in_parts

train_in_parts(*map(Path, sys.argv[1:4]), "distill", {"layers": 1, "steps": None, "minutes": 1.0}, "nothing")
"""


def fifteen_a_step(recorder: curve_module.Recorder) -> float:
    """Seconds: each step takes fifteen; the clock of the second process is wrong."""
    return 1e6 if os.environ.get("RANK") == "1" else 15.0 * (len(recorder.curve.losses) + 1)


def method(text: Path, name: str, fields: dict[str, Any]) -> Any:
    made: Any = TRAIN_METHODS[name](**{**HOW, "text": str(text), **fields})
    made.validate()
    return made


def train_here(model: Path, text: Path, output: Path, name: str, fields: dict[str, Any]) -> Curve:
    folder = output.parent / f"{output.name}.run"
    job = TrainJob(model=model, original=model, output=output, folder=folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(curve_module.Recorder, "seconds", fifteen_a_step)
        return train(method(text, name, fields), job)


def train_in_parts(model: Path, text: Path, output: Path, name: str, fields: dict[str, Any], killed: str) -> None:
    """One of several processes: says how much it holds; the first is killed before the mark of a checkpoint."""
    write_json = curve_module.write_json

    def kill_at_the_mark(path: Path, content: Any) -> None:
        if path.parent.name == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, content)

    def told(folder: Path, optimizer: Any, module: torch.nn.Module) -> None:
        learning = [p for p in module.parameters() if p in optimizer.state]  # and have had a gradient
        held = {
            "values": sum(own(p).numel() for p in module.parameters()),
            "all values": sum(p.numel() for p in module.parameters()),
            "moments": sum(own(optimizer.state[p]["exp_avg"]).numel() for p in learning),
            "all moments": sum(p.numel() for p in learning),
        }
        (output.parent / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held))
        write_moments(folder, optimizer, module)

    curve_module.write_json = kill_at_the_mark
    loop.write_moments = told
    train_here(model, text, output, name, {"shard": True} | fields)


def in_two(arguments: tuple[Any, ...], folder: Path) -> list[int | None]:
    """The exit codes of two processes with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alike = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    ended = run_together(train_in_parts, arguments, ranks, folder)
    if any(one.code not in (0, -signal.SIGKILL) for one in ended):
        print(*(one.said for one in ended), sep="\n")
    return [one.code for one in ended]


def same_course(run: Path, curve: Curve, relative: float = 1e-4) -> None:
    found = Curve.from_json(json.loads((run / "curve.json").read_text()))
    assert found.losses == pytest.approx(curve.losses, rel=relative, abs=1e-6)
    assert found.learning_rates == curve.learning_rates
    assert [step for step, _ in found.held_back] == [step for step, _ in curve.held_back]
    losses = [[loss for _, loss in one.held_back] for one in (found, curve)]
    assert losses[0] == pytest.approx(losses[1], rel=relative, abs=1e-6)


def same_result(found: Path, wanted: Path, share: float = 0.005) -> None:
    """All files' tensors: equal but for a small share, which is one rounding of its type away."""
    names = sorted(path.name for path in wanted.glob("*.safetensors"))
    assert names == sorted(path.name for path in found.glob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(found / name), load_file(wanted / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype
            if value.dtype == torch.float32:  # adapters; else bfloat16 and codes
                assert torch.allclose(ours[key], value, rtol=1e-3, atol=1e-5), key
            else:
                assert float((ours[key] != value).float().mean()) <= share, key
                assert torch.allclose(ours[key].double(), value.double(), rtol=2**-7, atol=1e-4), key


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curve]:
    output = tmp_path_factory.mktemp("alone") / "alone"
    return output, train_here(tiny_llama, text_file, output, "distill", SHALLOW)


def test_two_processes_with_a_part_each_are_killed_and_go_on_as_one_would(
    tiny_llama: Path, text_file: Path, tmp_path: Path, alone: tuple[Path, Curve]
) -> None:
    """Half of the model and of the moments in each; the checkpoint that one process alone can go on from, too."""
    output, run = tmp_path / "two", tmp_path / "two.run"
    arguments = (tiny_llama, text_file, output, "distill", SHALLOW)
    codes = in_two((*arguments, "checkpoint-4"), tmp_path)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] != 0
    held = [json.loads((tmp_path / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    for kind in ("values", "moments"):
        assert sum(one[kind] for one in held) == held[0][f"all {kind}"]
        assert abs(held[0][kind] - held[1][kind]) < 0.05 * held[0][f"all {kind}"]
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    whole = load_file(checkpoints(run)[0] / "model.safetensors")
    moments = load_file(checkpoints(run)[0] / MOMENTS)
    assert {f"exp_avg/{name}": value.shape for name, value in whole.items()}.items() <= {
        name: value.shape for name, value in moments.items()
    }.items()
    shutil.copytree(run, tmp_path / "one.run")
    assert in_two((*arguments, "nothing"), tmp_path) == [0, 0]
    same_course(run, alone[1])
    same_result(output, alone[0])
    train_here(tiny_llama, text_file, tmp_path / "one", "distill", SHALLOW)
    same_course(tmp_path / "one.run", alone[1])
    same_result(tmp_path / "one", alone[0])


def test_who_asks_for_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The field or accelerate's variable, among several processes."""
    plain, shared = (TRAIN_METHODS["distill"](**HOW, shard=shard) for shard in (False, True))  # type: ignore[call-arg]
    monkeypatch.delenv(ASKED, raising=False)
    found = []
    for count in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", count)
        found += [is_asked(plain), is_asked(shared)]
    monkeypatch.setenv(ASKED, "true")
    assert [*found, is_asked(plain)] == [False, False, False, True, True]


def test_what_cannot_be_shared_out_is_refused(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = {"on_policy": 0.5, "adversarial": 0.25, "shard": True, "prompt_tokens": 8}
    with pytest.raises(RecipeError, match=r"on_policy=0\.5 and adversarial=0\.25: .* allowed with shard: the text"):
        train_here(tiny_llama, text_file, tmp_path / "drawn", "distill", drawn)
    odd = torch.nn.Module()
    odd.register_parameter("size", torch.nn.Parameter(torch.ones(())))
    with pytest.raises(RecipeError, match="size is a single number, which has no rows"):
        shard_(odd, [])
    with pytest.raises(UsageError, match="written by a run whose model was not shared out"):
        read_moments(tmp_path, None, odd)


@pytest.mark.exhaustive
@pytest.mark.parametrize("training", TRAININGS)
def test_every_training_has_the_course_and_the_result_of_one_process(
    tiny_llama: Path, text_file: Path, tmp_path: Path, training: str
) -> None:
    name, fields = TRAININGS[training]
    curve = train_here(tiny_llama, text_file, tmp_path / "one", name, fields)
    assert in_two((tiny_llama, text_file, tmp_path / "two", name, fields, "nothing"), tmp_path) == [0, 0]
    coarse = training == "bfloat16"  # sums of other windows round otherwise there, and AdamW's step has no size
    same_course(tmp_path / "two.run", curve, 1e-3 if coarse else 1e-4)
    if not coarse:
        same_result(tmp_path / "two", tmp_path / "one")


@pytest.mark.exhaustive
def test_zeros_stay_zero_in_parts(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    recipe = {"name": "half", "steps": [{"method": "magnitude", "sparsity": 0.5}]}
    fettle.compress(tiny_llama, pruned, parse_recipe(recipe, "test"), evaluate=False)
    fields = {"keep_zeros": True, "hard": 1.0}
    curve = train_here(pruned, text_file, tmp_path / "one", "distill", fields)
    assert in_two((pruned, text_file, tmp_path / "two", "distill", fields, "nothing"), tmp_path) == [0, 0]
    same_course(tmp_path / "two.run", curve)
    same_result(tmp_path / "two", tmp_path / "one")


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_share_a_model_out(
    tiny_llama: Path, text_file: Path, tmp_path: Path, alone: tuple[Path, Curve], launcher: str
) -> None:
    """`shard` under torchrun; under accelerate launch --use_fsdp without it."""
    script = tmp_path / "child.py"
    code = LAUNCHED if launcher == "torchrun" else LAUNCHED.replace('"layers": 1', '"layers": 1, "shard": False')
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    accelerate = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    command = [*(torchrun if launcher == "torchrun" else accelerate), str(script)]
    command += [str(tiny_llama), str(text_file), str(tmp_path / "two")]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert ended.returncode == 0, ended.stderr
    assert (checkpoints(tmp_path / "two.run")[-1] / MOMENTS).is_file()
    same_course(tmp_path / "two.run", alone[1])
    same_result(tmp_path / "two", alone[0])
