"""The one training loop: transformers' `Trainer` over an objective, for every method of this room.

A method gives an objective, a module that turns windows into one loss and knows which of its parameters learn; the
loop gives steps. Gradient accumulation, mixed precision, the schedule, several processes under `torchrun` or
`accelerate launch`, checkpoints and resuming are Trainer's and Accelerate's. What is ours stands around it:

- Windows come in the order of a list (`text_mix.py`; what some places get is decided on the way, `sources/mix.py`), not
  from a sampler, so one process, two processes and a resumed run see the same windows in the same steps.
- A checkpoint holds only the parameters that learn, as safetensors, beside Trainer's optimizer, schedule and random
  states; it counts once it is marked as whole (`curve.py`). A killed run goes on from the last whole one, and gives the
  same bytes as an undisturbed one on the same number of threads.
- With `shard` the objective comes to Trainer shared out among the processes (`sharding.py`); what is stored is whole.
- The objective's loss on windows that no step sees, the start included, says which weights are kept.

Cost: parameters that learn four times in float32 (values, gradients, two moments), everything else once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fettle.errors import RecipeError
from fettle.methods.train.curve import BEST, CHECKPOINTS, Curve, Recorder, checkpoints, drop_torn, trainable
from fettle.methods.train.kept import room_in, verify
from fettle.methods.train.options import LoopFields
from fettle.methods.train.processes import is_main_process, process_count, wait_for_all
from fettle.methods.train.sharding import (
    MOMENTS,
    gather_,
    is_asked,
    is_shared_out,
    own,
    read_moments,
    read_parts,
    shard_,
    without_accelerates,
    write_moments,
    write_whole,
)
from fettle.methods.train.sources.mix import Mix
from fettle.methods.train.text_mix import TrainingText
from fettle.models.writer import write_json
from fettle.progress import Progress, Task

WEIGHTS, SCHEDULE = "model.safetensors", "scheduler.pt"  # the names that Trainer looks for
CURVE = "curve.json"
NO_WEIGHTS = {"log_scale", "scores", "ia3_l"}  # of two dimensions, and zero is not where they are small


class Objective(nn.Module):
    """What a method trains: windows → {"loss": a scalar}. Parameters with `requires_grad` learn."""

    def forward(self, window: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """The loss of some windows.

        Args:
            window: int64 [batch], which windows of the training text these are.
            input_ids: int64 [batch, length], their tokens.
        """
        raise TypeError(f"{type(self).__name__} is no objective: it has no forward")

    def begin(self, step: int, losses: Callable[[], Iterator[Tensor]]) -> None:
        """Called before each step; `losses` computes those of its windows, one by one. Nothing, unless overridden."""

    def rates(self) -> dict[str, float]:
        """Factors of the learning rate, by the beginning of a parameter's name; 1 for all others."""
        return {}

    def units(self) -> list[nn.Module]:
        """The modules whose parameters are gathered together where the objective is shared out."""
        return []

    def shared_out(self) -> None:
        """Called when this process has parts of the parameters, and hooks on the whole ones are gone; nothing here."""


class PlaceList(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The places of a run, in order; which window stands there is looked up when the step has begun."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"place": torch.tensor(place)}


class WindowList(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The windows that are held back, in order."""

    def __init__(self, ids: Tensor, order: Tensor) -> None:
        self._ids, self._order = ids, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        window = self._order[place]
        return {"window": window, "input_ids": self._ids[window]}


class _InOrder:
    """What the loop wants otherwise than Trainer does: no shuffling, and checkpoints of what learns alone."""

    model: nn.Module
    args: Any
    mix: Mix
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> Any:
        found = self.mix.take(inputs["place"]) if "place" in inputs else inputs
        return super()._prepare_inputs(found)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[attr-defined]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        write_whole(Path(output_dir or self.args.output_dir), WEIGHTS, trainable(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        take_(self.model, Path(resume_from_checkpoint) / WEIGHTS)

    def create_accelerator_and_postprocess(self) -> None:
        with without_accelerates():
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if is_shared_out(self.model):  # it averages its gradients itself: mixed precision is all that is missing
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_shared_out(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        write_moments(Path(output_dir), self.optimizer, self.model)
        if is_main_process():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (is_shared_out(self.model) or (Path(checkpoint) / MOMENTS).is_file()):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        read_moments(Path(checkpoint), self.optimizer, self.model)
        schedule = Path(checkpoint) / SCHEDULE
        self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def run(
    objective: Objective, text: TrainingText, fields: LoopFields, folder: Path, progress: Progress,
    mix: Mix | None = None,
) -> Curve:  # fmt: skip
    """Trains `objective` in place and leaves it with the weights that `fields.keep` names; resumes in `folder`.

    Args:
        objective: with its parameters that learn marked by `requires_grad`.
        text: its windows.
        fields: how long, how fast.
        folder: for checkpoints and the curve; of this run alone.
        progress: told of every step.
        mix: which window stands in which place; None for shuffled passes over `text`.

    Raises:
        NonFiniteError: a loss that is NaN or infinite.
        DiskFullError: a checkpoint does not fit; the run resumes once there is room.
        RecipeError: nothing learns, or more processes than windows in a part of a step.
    """
    if not trainable(objective):
        raise RecipeError("no parameter of the model learns with these options; name others to train")
    if is_asked(fields):
        shard_(objective, objective.units())
        objective.shared_out()
    steps = fields.planned_steps
    mix = mix or Mix(text, text.order(steps, fields.batch_windows, fields.seed), fields)
    folder.mkdir(parents=True, exist_ok=True)
    if is_main_process():
        drop_torn(folder)
    found = checkpoints(folder)
    total = steps if fields.minutes is None else math.ceil(60 * fields.minutes)
    with progress.task("training", total) as task, _quiet():
        recorder = _recorder(objective, fields, folder, task, mix)
        if found:
            recorder.resume(found[-1])
        trainer = _trainer(objective, mix, fields, folder, recorder)
        done = bool(recorder.curve.stopped) or len(recorder.curve.losses) >= steps
        if found and done:
            take_(objective, found[-1] / WEIGHTS)
        else:
            with room_in(folder):
                trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    curve = recorder.curve
    curve.seconds = recorder.seconds() if not (found and done) else curve.seconds
    best = curve.best
    wait_for_all()
    if fields.keep == "best" and best is not None and best[0] != len(curve.losses):
        take_(objective, folder / BEST)
    if is_main_process():
        write_json(folder / CURVE, curve.to_json())
    gather_(objective, keep=is_main_process())
    objective.eval()
    return curve


def take_(module: nn.Module, path: Path) -> None:
    """Puts the tensors of a file into the parameters of the same names, which must be those that learn."""
    learned = trainable(module)
    verify(path, {name: value.shape for name, value in learned.items()})
    for mine, value in read_parts(path, learned):
        own(mine).copy_(value)


def _recorder(objective: Objective, fields: LoopFields, folder: Path, task: Task, mix: Mix) -> Recorder:
    from transformers import TrainerCallback

    class RecorderCallback(Recorder, TrainerCallback):  # type: ignore[misc]
        """The recorder, with all other events left alone but the beginning of a step, which the mix waits for."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            mix.begin(state.global_step)
            objective.begin(state.global_step, lambda: _losses(objective, mix, state.global_step, fields))

    return RecorderCallback(objective, fields, folder, task)


def _losses(objective: Objective, mix: Mix, step: int, fields: LoopFields) -> Iterator[Tensor]:
    """The losses of the windows of one step, one by one, whatever the number of processes."""
    device = next(objective.parameters()).device
    for place in range(step * fields.batch_windows, (step + 1) * fields.batch_windows):
        inputs = {key: value.to(device) for key, value in mix.take(torch.tensor([place])).items()}
        yield objective(**inputs)["loss"]


def _trainer(objective: Objective, mix: Mix, fields: LoopFields, folder: Path, recorder: Recorder) -> Any:
    from transformers import Trainer

    class InOrderTrainer(_InOrder, Trainer):  # type: ignore[misc]
        """Trainer over a list of windows."""

    steps, text = fields.planned_steps, mix.text
    optimizer = _optimizer(objective, fields)
    timed = LambdaLR(optimizer, lambda _: timed_rate(recorder.share, fields)) if fields.minutes is not None else None
    trainer = InOrderTrainer(
        model=objective,
        args=_arguments(objective, fields, folder, steps, looks=len(text.held_back) > 0),
        train_dataset=PlaceList(len(mix)),
        eval_dataset=WindowList(text.ids, text.held_back) if len(text.held_back) else None,
        data_collator=_collate,
        callbacks=[recorder],
        optimizers=(optimizer, timed),  # without one it makes the schedule that the arguments name
    )
    trainer.mix = mix
    for printer in ("PrinterCallback", "ProgressCallback"):
        trainer.callback_handler.callbacks = [
            callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ != printer
        ]
    return trainer


def _arguments(objective: Objective, fields: LoopFields, folder: Path, steps: int, *, looks: bool) -> Any:
    from transformers import TrainingArguments

    device = next(objective.parameters()).device
    processes = process_count()
    part, left = divmod(fields.batch_windows, processes * fields.accumulate)
    if left or not part:
        raise RecipeError(
            f"batch_windows={fields.batch_windows} cannot be shared by {processes} processes in {fields.accumulate} "
            f"parts; allowed: multiples of {processes * fields.accumulate}"
        )
    fresh = not checkpoints(folder)  # a resumed run has looked at its start before
    found = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=part,
        per_device_eval_batch_size=part,
        gradient_accumulation_steps=fields.accumulate,
        learning_rate=fields.learning_rate,
        lr_scheduler_type=fields.schedule if fields.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(fields.warmup * steps),
        bf16=fields.precision == "bfloat16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if looks else "no",
        eval_steps=fields.look_every,
        eval_on_start=looks and fresh,
        save_strategy="steps",
        save_steps=fields.checkpoint_every,
        label_names=["input_ids"],  # so that an evaluation has a loss
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=fields.seed,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    if device.type == "cuda" and processes == 1:
        pin_(found, device)
    return found


def pin_(arguments: Any, device: torch.device) -> None:
    """One process computes where its objective is: Trainer would take the first GPU, and with several of them put
    copies of the model on all and multiply the windows of a step by their number.
    """
    arguments.__dict__["_setup_devices"], arguments._n_gpu = device, 1  # what `device` and `n_gpu` give
    torch.cuda.set_device(device)  # Accelerate says "cuda", which means the current one


def _optimizer(objective: Objective, fields: LoopFields) -> torch.optim.Optimizer:
    """AdamW over groups of one factor each; weights decay, and nothing else (scales, scores, norms, biases)."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    factors = objective.rates()
    for name, value in objective.named_parameters():
        if value.requires_grad:
            factor = next((factor for start, factor in factors.items() if name.startswith(start)), 1.0)
            decays = value.dim() >= 2 and not NO_WEIGHTS & set(name.split("."))
            groups.setdefault((factor, decays), []).append(value)
    return torch.optim.AdamW(
        [
            {
                "params": values,
                "lr": factor * fields.learning_rate,
                "weight_decay": fields.weight_decay if decays else 0.0,
            }
            for (factor, decays), values in groups.items()
        ]
    )


def timed_rate(share: float, fields: LoopFields) -> float:
    """The factor of the learning rate when this share of the minutes is over: Trainer's schedules, by the clock.

    >>> [round(timed_rate(share, LoopFields(minutes=1.0, warmup=0.2)), 2) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if share < fields.warmup:
        return share / fields.warmup
    left = (1 - share) / (1 - fields.warmup) if fields.warmup < 1 else 1.0
    if fields.schedule == "cosine":
        return (1 - math.cos(math.pi * left)) / 2
    return left if fields.schedule == "linear" else 1.0


def _collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Trainer prints its state; a room below the command line prints nothing."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
