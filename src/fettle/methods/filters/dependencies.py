"""Which channels of a convolution network live and die together.

A filter of a convolution cannot go alone: its batch norm loses a channel, every layer that reads it loses an input, a
depthwise convolution behind it a filter of its own, and where a residual addition joins two paths, both lose the same
channel. Torch-Pruning (Fang et al.: DepGraph, 2023, https://arxiv.org/abs/2301.12900) finds these groups by following
one forward pass through autograd, and cuts them; both are used as they are. Ours is what is asked of a group (`Member`:
a layer, its side, its channels) and a check.

    group = {(layer, side, channels)}      sides: out [rows], in [columns], norm, depthwise

The check: in a copy of the network, every reader of the removed channels gets zeros in those columns; the cut network
must compute the same logits. It costs two forward passes and a copy, and turns a graph that was traced wrongly (a
function that moves channels in a way that autograd does not tell) into an error instead of a network that guesses.

Refused: networks whose channels also go through anything but convolutions, batch norms, linear layers and operations
without parameters. Cost: a forward pass for tracing; nothing grows with the number of images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from fettle.errors import ModelError, UsageError

Side = Literal["out", "in", "norm", "depthwise"]
TOLERANCE = 1e-3  # of the largest logit: far below what one wrong channel does, far above rounding


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        name: the layer's path.
        layer: a Conv2d, Linear or batch norm.
        side: which of its dimensions holds the channels.
        channels: positions in that dimension.
        roots: the channel of the group that each of them is; a flattened image has several positions for one.
    """

    name: str
    layer: Any
    side: Side
    channels: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that only go together.

    Attributes:
        name: the path of the layer that makes them first found.
        size: how many channels there are now.
        repeats: of how many equal parts, which lose the same positions: the groups of a grouped convolution.
        members: every layer that loses something.
        handle: the library's own group.
    """

    name: str
    size: int
    repeats: int
    members: tuple[Member, ...]
    handle: Any


def require_torch_pruning() -> Any:
    """The package; UsageError where it is not installed."""
    try:
        import torch_pruning
    except ImportError:
        raise UsageError(
            "pruning the filters of a convolution network follows its dependencies with Torch-Pruning, which is not "
            "installed; pip install 'fettle-llm[vision]'"
        ) from None
    return torch_pruning


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Float [images, classes]: what the network says, whether it returns a tensor or an object with `.logits`."""
    found = network(images)
    return found if isinstance(found, Tensor) else found.logits


def channel_groups(network: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """The groups that may be pruned, all but the logits'; leaves the network as it is.

    Args:
        network: an image classifier, in eval mode afterwards.
        example: float32 [1, channels, height, width].

    Raises:
        ModelError: it cannot be traced, or channels pass through a layer that cannot be cut.
    """
    graph = _traced(network, example)
    names = {module: name for name, module in network.named_modules()}
    last = {node.module for node in graph.module2node.values() if not node.outputs}
    found = []
    for group in graph.get_all_groups():
        if any(dep.target.module in last and _makes(graph, dep) for dep, _ in group):
            continue  # the classes
        members = tuple(
            _member(graph, names, dep, channels, item.root_idxs)
            for item in group.items
            for dep, channels in (item,)
            if isinstance(dep.target.module, nn.Module) and any(True for _ in dep.target.module.parameters())
        )
        if not any(isinstance(member.layer, nn.Conv2d) for member in members):
            continue  # a group of linear layers alone has no filters
        root = group[0].dep.target.module
        repeats = max((_repeats(member) for member in members), default=1)
        size = len(group[0].idxs)
        found.append(ChannelGroup(names[root], size, repeats, members, group))
    if not found:
        raise ModelError("the network has no convolution whose filters can go; prune_filters needs one before the last")
    return found


def _traced(network: nn.Module, example: Tensor) -> Any:
    pruning = require_torch_pruning()
    network.eval()
    try:
        with torch.enable_grad():
            graph = pruning.DependencyGraph().build_dependency(network, example, forward_fn=logits_of, verbose=False)
    except Exception as error:  # whatever a network's own code or the tracing raises
        raise ModelError(
            f"the network cannot be traced on images of {list(example.shape[1:])}: {error}. Give images of the size "
            "that it was made for; a network whose forward pass depends on its input cannot be pruned."
        ) from error
    if graph.unwrapped_parameters:
        names = {parameter: name for name, parameter in network.named_parameters()}
        loose = ", ".join(sorted(names.get(entry[0], "?") for entry in graph.unwrapped_parameters)[:3])
        raise ModelError(
            f"the network has parameters outside of layers ({loose}), and nobody can say which channels they belong "
            "to; prune_filters takes networks of convolutions, batch norms and linear layers"
        )
    return graph


def _makes(graph: Any, dep: Any) -> bool:
    return bool(graph.is_out_channel_pruning_fn(dep.handler))


def _member(graph: Any, names: Mapping[Any, str], dep: Any, channels: Sequence[int], roots: Sequence[int]) -> Member:
    layer = dep.target.module
    side: Side
    if isinstance(layer, BatchNorm):
        side = "norm"
    elif isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels == layer.in_channels > 1:
        side = "depthwise"
    elif isinstance(layer, nn.Conv2d | nn.Linear):
        side = "out" if _makes(graph, dep) else "in"
    else:
        raise ModelError(
            f"{names[layer]} is a {type(layer).__name__}, which prune_filters cannot cut; it takes networks of Conv2d, "
            "batch norms, linear layers and operations without parameters"
        )
    return Member(names[layer], layer, side, tuple(channels), tuple(roots))


def _repeats(member: Member) -> int:
    grouped = isinstance(member.layer, nn.Conv2d) and member.side in ("in", "out")
    return int(member.layer.groups) if grouped else 1


def cut(group: ChannelGroup, channels: Sequence[int]) -> None:
    """Removes channels of a group from every member, in place; the group itself is spent afterwards."""
    if channels:
        root = group.handle[0]
        graph = group.handle._DG
        graph.get_pruning_group(root.dep.target.module, root.dep.handler, list(channels)).prune(record_history=False)


def cut_checked(
    network: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Sequence[int]], example: Tensor
) -> None:
    """Removes channels (group's name → positions) in place, and checks that only they are gone.

    Raises:
        ModelError: the cut network computes something else than one whose layers ignore those channels.
    """
    names = {module: name for name, module in network.named_modules()}
    with torch.no_grad():
        masked = copy.deepcopy(network)
        for group in groups:
            _ignore(masked, group, set(removed.get(group.name, ())), names)
        expected = logits_of(masked, example)
        del masked
        for group in groups:
            cut(group, removed.get(group.name, ()))
        try:
            found = logits_of(network, example)
        except RuntimeError as error:
            raise ModelError(f"{_WRONG} ({error})") from error
    scale = float(expected.abs().max())
    if not torch.isfinite(found).all() or float((found - expected).abs().max()) > TOLERANCE * max(scale, 1e-6):
        raise ModelError(f"{_WRONG} (logits differ by {float((found - expected).abs().max()):.3g} of {scale:.3g})")


_WRONG = (
    "the network's dependencies were not traced rightly, so nothing was written: without the removed channels it "
    "computes something else than when they are ignored. It moves channels in a way that cannot be followed"
)


def _ignore(masked: nn.Module, group: ChannelGroup, removed: set[int], names: Mapping[nn.Module, str]) -> None:
    """Zeroes the columns with which any layer reads the removed channels."""
    for member in group.members:
        if member.side != "in":
            continue
        layer = masked.get_submodule(names[member.layer])
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        parts = int(getattr(layer, "groups", 1))
        rows, columns = weight.shape[0] // parts, weight.shape[1]
        for channel, root in zip(member.channels, member.roots, strict=True):
            if root in removed:
                part, column = divmod(channel, columns)
                weight[part * rows : (part + 1) * rows, column] = 0
