"""A model shared out among the processes of a run: each holds a part of every parameter, gradient and moment (FSDP).

ZeRO's third stage, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054; Zhao et al. 2023,
https://arxiv.org/abs/2304.11277. Of N processes each holds one part of the rows of every parameter. The parameters of
a unit (a block, the embedding, the head) are gathered before it computes, forward and again backward, and let go behind
it; its gradients are averaged, and each process keeps those of its own rows. The optimizer then sees parts alone.

torch's `fully_shard` (FSDP2) does this, on CPUs with gloo as well. Ours: Trainer is given an objective that is shared
out already, so that the same lines run on every device (Accelerate's own FSDP takes no CPUs), and everything that is
stored is whole: tensors are gathered one after the other while the first process writes them. A checkpoint so has no
word of how many processes wrote it, and any number goes on from it.

What is shared out is what the student's modules hold as parameters, those that do not learn included. Whole in every
process stay the teacher, masks, and the codes of a packed base.

Cost: per step the parameters cross the wire twice and the gradients once, where data-parallel training sends gradients
alone. Memory: 4 / N of what learns in place of 4, and the largest unit whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from fettle.errors import RecipeError, UsageError
from fettle.methods.train.kept import keep
from fettle.methods.train.options import LoopFields
from fettle.methods.train.processes import is_main_process, process_count
from fettle.models.writer import stored_order

ASKED = "ACCELERATE_USE_FSDP"  # what accelerate launch --use_fsdp sets
MOMENTS = "moments.safetensors"


def is_asked(fields: LoopFields) -> bool:
    """Whether a model is to be shared out: several processes, and `shard` or `accelerate launch --use_fsdp`."""
    return process_count() > 1 and (fields.shard or os.environ.get(ASKED, "").lower() in ("1", "true", "yes"))


def is_shared_out(module: nn.Module) -> bool:
    """Whether `shard_` was called on it."""
    return any(is_part(parameter) for parameter in module.parameters())


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts: a DTensor, whose class takes a second to import."""
    return hasattr(tensor, "full_tensor")


def shard_(objective: nn.Module, units: Sequence[nn.Module]) -> None:
    """Leaves this process its parts of all parameters; every process must call it, with the same values.

    Args:
        objective: whose forward is called; its parameters become DTensors of the same names and shapes.
        units: modules in it whose parameters are gathered together; what is in none of them is one more.

    Raises:
        RecipeError: a parameter without rows.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, parameter in objective.named_parameters():
        if parameter.dim() == 0:
            raise RecipeError(f"{name} is a single number, which has no rows to share out; train without shard")
    mesh = init_device_mesh(next(objective.parameters()).device.type, (process_count(),))
    for unit in _separate(units):
        fully_shard(unit, mesh=mesh)
    # else a pass without gradients would leave the rest of the parameters whole, and the optimizer knows their parts
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)


def gather_(objective: nn.Module, *, keep: bool) -> None:
    """Makes the parameters plain tensors again: whole where `keep`, without values elsewhere. All processes call it."""
    made: dict[int, nn.Parameter] = {}
    for module in objective.modules():
        for name, part in module._parameters.items():
            if part is None or not is_part(part):
                continue
            if id(part) not in made:
                full = whole(part.detach())
                made[id(part)] = nn.Parameter(full if keep else full.to("meta"), requires_grad=part.requires_grad)
            module._parameters[name] = made[id(part)]


def whole(tensor: Tensor) -> Tensor:
    """All of what may lie in parts; then every process must ask for the same tensors in the same order."""
    part: Any = tensor
    found: Tensor = part.full_tensor() if is_part(tensor) else tensor
    return found


def own(tensor: Tensor) -> Tensor:
    """The rows of this process, in place; the tensor itself where it lies in no parts."""
    part: Any = tensor
    found: Tensor = part.to_local() if is_part(tensor) else tensor
    return found


def own_of(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole value, the rows that this process holds of `like`."""
    return own(_as_parts(value, like))


def write_whole(folder: Path, filename: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors that may lie in parts; the first process writes, all must call it where any lies in parts."""
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        keep(folder, filename, tensors, whole)
    else:
        for name in (*sorted(tensors), *stored_order(tensors)):  # as `keep` reads them
            whole(tensors[name])


def read_parts(path: Path, like: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of `like`, and the rows of the file's tensor of that name that belong to this process."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in like.items():
            yield tensor, own_of(file.get_tensor(name).to(tensor.device), tensor)


def write_moments(folder: Path, optimizer: Any, module: nn.Module) -> None:
    """Writes the optimizer's state by the parameters' names: exp_avg/…, exp_avg_sq/…, step/…"""
    state = {
        f"{kind}/{name}": value
        for name, parameter in module.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    write_whole(folder, MOMENTS, state)


def read_moments(folder: Path, optimizer: Any, module: nn.Module) -> None:
    """Gives the optimizer the state that `write_moments` wrote, whatever number of processes did.

    Raises:
        UsageError: there is none.
    """
    path = folder / MOMENTS
    if not path.is_file():
        raise UsageError(
            f"{folder} was written by a run whose model was not shared out, and cannot be gone on from with shard; "
            "give the command without it, or start over with --fresh"
        )
    parameters = dict(module.named_parameters())
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no dictionary)
            kind, _, name = key.partition("/")
            value, parameter = file.get_tensor(key), parameters[name]
            alike = value.shape == parameter.shape and value.dim() > 0  # else the number of steps
            optimizer.state[parameter][kind] = _as_parts(value.to(parameter.device), parameter) if alike else value


@contextmanager
def without_accelerates() -> Iterator[None]:
    """Inside, Accelerate does not see that it was asked for FSDP: what comes to it is shared out already."""
    asked = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ASKED] = asked


def _as_parts(value: Tensor, like: Tensor) -> Tensor:
    if not is_part(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    parts: Any = like
    return distribute_tensor(value, parts.device_mesh, parts.placements, src_data_rank=None)  # nothing is sent


def _separate(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that share no parameter with another one: a head that is the embedding stays with the rest."""
    holders: dict[int, int] = {}
    for unit in units:
        for parameter in unit.parameters():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return [
        unit
        for unit in units
        if any(True for _ in unit.parameters()) and all(holders[id(p)] == 1 for p in unit.parameters())
    ]
