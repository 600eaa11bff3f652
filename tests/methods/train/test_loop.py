"""The loop: exact resume after a kill, the same curve on two processes, early stopping, limits."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.apart import ROOT, run_apart, run_together
from transformers.models.llama.modeling_llama import LlamaMLP

from fettle.api.completing import complete
from fettle.errors import DiskFullError, NonFiniteError, RecipeError, ResumeError
from fettle.methods.train import Distill
from fettle.methods.train import curve as curve_module
from fettle.methods.train.curve import MARK, Curve, checkpoints, drop_torn
from fettle.methods.train.job import TrainJob
from fettle.methods.train.kept import keep
from fettle.methods.train.loop import Objective, pin_, run, take_
from fettle.methods.train.options import LoopFields
from fettle.methods.train.samples import check_samples
from fettle.methods.train.text_mix import TrainingText
from fettle.methods.train.training import train
from fettle.progress import Silent

HOW: dict[str, Any] = {
    "steps": 6, "windows": 12, "length": 32, "batch_windows": 4, "look_every": 3, "checkpoint_every": 2, "held_back": 2,
    "learning_rate": 3e-3, "layers": 1, "accumulate": 2, "keep": "last",
}  # fmt: skip
LAUNCHED = """
import sys
from pathlib import Path
from tests.methods.train.test_loop import train_until

train_until(*map(Path, sys.argv[1:4]), "nothing")
"""


class Pull(Objective):
    """One weight that is pulled to 3; windows held back (from the third on) want it at `other`."""

    def __init__(self, other: float = 3.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.still = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.other = other

    def forward(self, window: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        wanted = torch.where(window < 2, 3.0, self.other)
        return {"loss": (self.weight - wanted).square().mean()}


def windows(held_back: int = 1) -> TrainingText:
    ids = torch.zeros(2 + held_back, 4, dtype=torch.int64)
    return TrainingText(ids=ids, learned=2, sources=("none",), sha256="", note="")


def fields(**other: Any) -> Distill:
    return Distill(**{"steps": 20, "batch_windows": 2, "learning_rate": 0.2, "look_every": 1, "warmup": 0.0, **other})


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def train_until(model: Path, text: Path, output: Path, killed: str) -> None:
    """Trains; a kill comes before the mark of the checkpoint `killed`."""
    write_json = curve_module.write_json

    def kill_at_the_mark(path: Path, content: Any) -> None:
        if path.parent.name == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, content)

    curve_module.write_json = kill_at_the_mark
    folder = output.parent / (output.name + ".run")
    train(Distill(**HOW, text=str(text)), TrainJob(model=model, original=model, output=output, folder=folder))


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curve]:
    output = tmp_path_factory.mktemp("whole") / "undisturbed"
    job = TrainJob(model=tiny_llama, original=tiny_llama, output=output, folder=output.parent / "undisturbed.run")
    return output, train(Distill(**HOW, text=str(text_file)), job)


def test_a_run_killed_inside_a_checkpoint_gives_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, undisturbed: tuple[Path, Curve]
) -> None:
    output = tmp_path / "killed"
    ended = run_apart(train_until, tiny_llama, text_file, output, "checkpoint-4", folder=tmp_path)
    assert ended.code == -signal.SIGKILL, ended.said
    folder = tmp_path / "killed.run"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert (folder / "checkpoints" / "checkpoint-4").is_dir()  # torn: everything in it but its mark
    assert not output.exists()
    curve = train(
        Distill(**HOW, text=str(text_file)),
        TrainJob(model=tiny_llama, original=tiny_llama, output=output, folder=folder),
    )
    assert curve.losses == undisturbed[1].losses
    assert curve.learning_rates == undisturbed[1].learning_rates
    assert curve.held_back == undisturbed[1].held_back
    assert digests(output) == digests(undisturbed[0])


def same_curve(run: Path, undisturbed: tuple[Path, Curve]) -> bool:
    found = Curve.from_json(json.loads((run / "curve.json").read_text()))
    held_back = [[loss for _, loss in curve.held_back] for curve in (found, undisturbed[1])]
    return found.losses == pytest.approx(undisturbed[1].losses, rel=1e-4) and held_back[0] == pytest.approx(
        held_back[1], rel=1e-4
    )


def test_two_processes_give_the_curve_of_one(
    tiny_llama: Path, text_file: Path, tmp_path: Path, undisturbed: tuple[Path, Curve]
) -> None:
    """Each with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alike = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    ended = run_together(train_until, (tiny_llama, text_file, tmp_path / "two", "nothing"), ranks, tmp_path)
    assert [one.code for one in ended] == [0, 0], ended
    assert same_curve(tmp_path / "two.run", undisturbed)


@pytest.mark.exhaustive
def test_torchrun_gives_the_curve_of_one_process(
    tiny_llama: Path, text_file: Path, tmp_path: Path, undisturbed: tuple[Path, Curve]
) -> None:
    script = tmp_path / "child.py"
    script.write_text(LAUNCHED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(script), str(tiny_llama), str(text_file), str(tmp_path / "two")]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    assert subprocess.run([*launcher, *arguments], check=False, capture_output=True, env=environment).returncode == 0
    assert same_curve(tmp_path / "two.run", undisturbed)


ALIKE: dict[str, dict[str, Any]] = {
    "soft": {},
    "layers": {"soft": 0.0, "features": 1.0, "attention": 1.0, "values": 1.0, "logits": 1.0},
    "own words": {"hard": 1.0, "soft": 0.0, "on_policy": 0.25, "prompt_tokens": 6},
}


@pytest.mark.parametrize("signals", ALIKE)
def test_parts_of_a_step_add_up_to_the_step(signals: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 4):
        folder = tmp_path / str(accumulate)
        how = {**HOW, "accumulate": accumulate, "steps": 3, "text": str(text_file), **ALIKE[signals]}
        job = TrainJob(
            model=tiny_llama, original=tiny_llama, output=folder, folder=tmp_path / f"{accumulate}.run",
            complete=complete,
        )  # fmt: skip
        curve = train(Distill(**how), job)
        found.append(curve.losses + [loss for _, loss in curve.held_back])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"relations": 1.0, "accumulate": 4, "length": 16},
         r"relations compares samples with each other, and there are 1 at once: batch_windows=4 over processes=1 and "
         r"accumulate=4 are 1 windows with 1 samples each \(length=16\); allowed: at least 2"),
        ({"distances": 1.0, "accumulate": 4}, r"there are 2 at once: .*accumulate=4 are 1 windows with 2 samples each"),
        ({"relations": 1.0, "accumulate": 1, "length": 16, "held_back": 5},
         r"there are 1 at once: held_back=5 leaves 1 windows for the last of batches of 4"),
    ],
)  # fmt: skip
def test_too_few_samples_are_refused_before_the_first_step(
    fields: dict[str, Any], told: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    job = TrainJob(model=tiny_llama, original=tiny_llama, output=tmp_path / "out", folder=tmp_path / "run")
    with pytest.raises(RecipeError, match=told):
        train(Distill(**{**HOW, "layers": None, "text": str(text_file), **fields}), job)


def test_processes_share_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopFields(batch_windows=4, length=16)
    check_samples(["relations"], loop, held_back=5, each=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_samples(["relations"], loop, held_back=5, each=2)
    with pytest.raises(RecipeError, match="over processes=4 and accumulate=1 are 1 windows"):
        check_samples(["relations"], loop, held_back=5, each=1)


def test_products_are_in_bfloat16_and_what_learns_is_not(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`precision`: the curve is near that of float32 and not the same; weights and moments have all their bits."""
    from safetensors.torch import load_file

    given = []
    forward = LlamaMLP.forward

    def seen(layer: Any, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = forward(layer, x)
        given.append(found.dtype) if layer.training else None
        return found

    monkeypatch.setattr(LlamaMLP, "forward", seen)
    losses, kinds = [], []
    for precision in ("float32", "bfloat16"):
        folder = tmp_path / precision
        job = TrainJob(model=tiny_llama, original=tiny_llama, output=folder, folder=tmp_path / f"{precision}.run")
        how = {**HOW, "precision": precision, "steps": 2, "text": str(text_file)}
        losses.append(train(Distill(**how), job).losses)
        kinds.append(set(given))
        given.clear()
    assert kinds == [{torch.float32}, {torch.bfloat16}]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    checkpoint = checkpoints(tmp_path / "bfloat16.run")[-1]
    assert {value.dtype for value in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


def test_blocks_that_run_again_for_their_gradients_change_nothing(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses, and every block is indeed run twice a step."""
    ran = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda layer, x: ran.append(layer.training) or forward(layer, x))
    losses = []
    for again in (False, True):
        job = TrainJob(
            model=tiny_llama, original=tiny_llama, output=tmp_path / str(again), folder=tmp_path / f"{again}.run"
        )
        method = Distill(
            steps=2, windows=8, length=32, batch_windows=4, held_back=0, hard=1.0, soft=0.0, text=str(text_file),
            gradient_checkpointing=again,
        )  # fmt: skip
        losses.append(train(method, job).losses)
        losses.append([ran.count(True)])
        ran.clear()
    assert losses[0] == losses[2]
    assert losses[3] == [2 * losses[1][0]]


def test_the_weights_with_the_least_held_back_loss_are_kept(tmp_path: Path) -> None:
    """Training pulls to 3, what is held back wants 1: the best lies on the way, and it ends five looks after it."""
    objective = Pull(other=1.0)
    curve = run(objective, windows(), fields(steps=40, patience=5), tmp_path, Silent())
    assert curve.best is not None
    assert abs(float(objective.weight.detach()) - 1.0) == pytest.approx(curve.best[1] ** 0.5, abs=1e-5)
    assert 0 < curve.best[0] < len(curve.losses) == curve.best[0] + 5 < 40
    assert curve.stopped == "5 looks at the windows held back without a gain"
    last = Pull(other=1.0)
    run(last, windows(), fields(steps=20, patience=50, keep="last"), tmp_path / "last", Silent())
    assert abs(float(last.weight.detach()) - 1.0) > 0.5


def test_the_start_is_kept_where_training_only_harms(tmp_path: Path) -> None:
    objective = Pull(other=0.0)
    curve = run(objective, windows(), fields(patience=3), tmp_path, Silent())
    assert float(objective.weight.detach()) == 0.0
    assert curve.best == (0, 0.0)
    assert len(curve.losses) == 3


def test_only_what_learns_is_in_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    objective = Pull()
    run(objective, windows(0), fields(steps=4, checkpoint_every=2), tmp_path, Silent())
    found = checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-4"]
    assert load_file(found[-1] / "model.safetensors").keys() == {"weight"}
    assert torch.equal(load_file(found[-1] / "model.safetensors")["weight"], objective.weight.detach())
    assert not list(tmp_path.rglob("training_args.bin"))
    (found[-1] / MARK).unlink()
    drop_torn(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not found[-1].exists()


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = Pull()
    before = run(first, windows(), fields(steps=4, keep="last"), tmp_path, Silent())
    again = Pull()
    after = run(again, windows(), fields(steps=4, keep="last"), tmp_path, Silent())
    assert after.to_json() == {**before.to_json(), "seconds": after.seconds}
    assert torch.equal(first.weight, again.weight)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5056 vs 4948"),
    ],
)
def test_a_run_whose_checkpoint_found_no_room_goes_on_once_there_is_some(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch says it of a volume that filled up while it wrote the moments."""
    whole = Pull()
    run(whole, windows(), fields(steps=4, checkpoint_every=2, keep="last"), tmp_path / "whole", Silent())

    def full(*rest: Any, **more: Any) -> None:
        raise error

    with monkeypatch.context() as patched, pytest.raises(DiskFullError, match=r"run the same command again"):
        patched.setattr(torch, "save", full)
        run(Pull(), windows(), fields(steps=4, checkpoint_every=2, keep="last"), tmp_path / "full", Silent())
    again = Pull()
    curve = run(again, windows(), fields(steps=4, checkpoint_every=2, keep="last"), tmp_path / "full", Silent())
    assert len(curve.losses) == 4
    assert torch.equal(again.weight, whole.weight)


class Clock(curve_module.Recorder):
    """Each step takes ten seconds."""

    def seconds(self) -> float:
        return 10.0 * (len(self.curve.losses) + 1)


def test_minutes_alone_bound_a_run_and_its_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps of ten seconds in two minutes: the step size falls to zero with the last, which is looked at."""

    class Told(Silent):
        def __init__(self) -> None:
            self.total, self.done = 0, 0

        @contextmanager
        def task(self, description: str, total: int) -> Iterator[Any]:
            self.total = total
            yield self

        def advance(self, n: int = 1) -> None:
            self.done += n

    monkeypatch.setattr(curve_module.Recorder, "seconds", Clock.seconds)
    how: dict[str, Any] = {"steps": None, "minutes": 2.0, "look_every": 5, "schedule": "linear"}
    told = Told()
    curve = run(Pull(), windows(), fields(**how), tmp_path / "linear", told)
    assert curve.learning_rates == pytest.approx([0.2 * (1 - step / 12) for step in range(12)])
    assert [step for step, _ in curve.held_back] == [0, 5, 10, 12]
    assert curve.stopped == "2 minutes were over"
    assert (told.total, told.done) == (120, 120)
    again = Pull()
    assert run(again, windows(), fields(**how), tmp_path / "linear", Silent()).losses == curve.losses  # not run again
    cosine = run(Pull(), windows(0), fields(**how | {"schedule": "cosine", "warmup": 0.25}), tmp_path / "c", Silent())
    assert cosine.learning_rates[:4] == pytest.approx([0.0, 0.2 / 3, 0.4 / 3, 0.2])
    assert cosine.learning_rates[6:] == sorted(cosine.learning_rates[6:], reverse=True)
    assert cosine.learning_rates[-1] < 0.01


def test_a_timed_run_that_was_killed_goes_on_with_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"steps": None, "minutes": 2.0, "checkpoint_every": 4, "schedule": "linear"}
    with monkeypatch.context() as slow:  # the sixth step takes for ever
        slow.setattr(curve_module.Recorder, "seconds", Clock.seconds)
        first = run(Pull(), windows(0), fields(**how), tmp_path, Silent())
    for checkpoint in checkpoints(tmp_path)[1:]:
        shutil.rmtree(checkpoint)
    (found,) = checkpoints(tmp_path)
    told = json.loads((found / MARK).read_text())
    (found / MARK).write_text(json.dumps({**told, "seconds": 119.9}))
    second = run(Pull(), windows(0), fields(**how), tmp_path, Silent())
    steps = len(told["losses"])
    assert second.losses[:steps] == first.losses[:steps]
    assert second.learning_rates[steps] == pytest.approx(first.learning_rates[steps])  # as the checkpoint says
    assert all(rate < 0.001 for rate in second.learning_rates[steps + 1 :])
    assert second.stopped == "2 minutes were over"
    assert 120 <= second.seconds < 125


def test_tokens_bound_a_run(tmp_path: Path) -> None:
    """Windows of 4 tokens, 2 a step: 41 tokens are 6 steps, over which the schedule falls."""
    how = fields(steps=None, tokens=41, length=4, schedule="linear")
    curve = run(Pull(), windows(0), how, tmp_path, Silent())
    assert curve.learning_rates == pytest.approx([0.2 * (1 - step / 6) for step in range(6)])
    assert curve.stopped == ""


class Parts(Objective):
    """A bit of everything that an optimizer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.weight = torch.nn.Parameter(torch.ones(2, 3))
        self.layer.log_scale = torch.nn.Parameter(torch.ones(2, 3))
        self.layer.scores = torch.nn.Parameter(torch.ones(2, 3))
        self.layer.bias = torch.nn.Parameter(torch.ones(2))
        self.layer.ia3_l = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.ones(2, 1))})
        self.norm = torch.nn.Parameter(torch.ones(3))
        self.factors: dict[str, float] = {}

    def rates(self) -> dict[str, float]:
        return self.factors

    def forward(self, window: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": sum(0 * value.sum() for value in self.parameters()) + 0 * window.sum()}  # type: ignore[dict-item]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_weights_decay_and_nothing_else_does(tmp_path: Path, factor: float) -> None:
    """Without any gradient, one step shrinks weights by rate times decay, whatever the factor of the rate."""
    parts = Parts()
    parts.factors = {"layer.weight": factor, "layer.log_scale": factor}
    how = fields(steps=1, schedule="constant", weight_decay=0.5, keep="last")
    run(parts, windows(0), how, tmp_path, Silent())
    for name, value in parts.named_parameters():
        wanted = 1 - 0.2 * factor * 0.5 if name == "layer.weight" else 1.0
        assert torch.allclose(value, torch.full_like(value, wanted)), name


def test_factors_of_the_rate_are_steps_sizes(tmp_path: Path) -> None:
    """Adam's first step is the rate, times the factor that the objective gives a parameter."""

    class Pulled(Parts):
        def forward(self, window: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": sum(value.sum() for value in self.parameters()) + 0 * window.sum()}  # type: ignore[dict-item]

    parts = Pulled()
    parts.factors = {"layer.log_scale": 0.25, "norm": 0.0}
    run(parts, windows(0), fields(steps=1, schedule="constant", keep="last"), tmp_path, Silent())
    for name, value in parts.named_parameters():
        wanted = 1 - 0.2 * parts.factors.get(name, 1.0)
        assert torch.allclose(value, torch.full_like(value, wanted), atol=1e-5), name


def test_a_loss_that_is_no_number_ends_with_its_step(tmp_path: Path) -> None:
    class Broken(Pull):
        def forward(self, window: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.weight.sum() * torch.inf}

    with pytest.raises(NonFiniteError, match="the loss of step 1 is"):
        run(Broken(), windows(0), fields(), tmp_path, Silent())


def test_what_cannot_be_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = Pull()
    still.weight.requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter of the model learns"):
        run(still, windows(), fields(), tmp_path, Silent())
    keep(tmp_path, "other.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(ResumeError, match="holds other parameters"):
        take_(Pull(), tmp_path / "other.safetensors")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="cannot be shared by 3 processes"):
        run(Pull(), windows(), fields(), tmp_path, Silent())


def test_the_schedule_rises_and_falls(tmp_path: Path) -> None:
    def rates(name: str, warmup: float) -> list[float]:
        chosen = fields(schedule=name, warmup=warmup)
        return run(Pull(), windows(0), chosen, tmp_path / name, Silent()).learning_rates

    cosine, constant = rates("cosine", 0.2), rates("constant", 0.0)
    assert cosine.index(max(cosine)) == 4
    assert max(cosine) == pytest.approx(0.2)
    assert cosine[-1] < 0.01
    assert set(constant) == {0.2}


def test_one_process_stays_on_its_device_however_many_gpus_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[])
    arguments._n_gpu = 2  # as Trainer counts them
    assert arguments.train_batch_size == 8
    pin_(arguments, torch.device("cuda:1"))
    assert arguments.device == torch.device("cuda:1")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
    assert current == [torch.device("cuda:1")]
