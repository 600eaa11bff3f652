"""How much a neuron, a head or a channel of the residual stream is missed: five scores.

With a what the unit gives to those that read it, g the gradient of the text's loss for it, over tokens t:

    activation     √ mean a²                  Muralidharan et al.: Minitron, 2024, https://arxiv.org/abs/2407.14679, 2.2
    contribution   √ mean ‖W[:, unit]·a‖²     the same in the residual stream: behind the matrix that reads the unit
    magnitude      √ Σ w²                     over all weights that belong to the unit; no text
    taylor         mean over windows |Σ a·g|  first order: Molchanov et al. 2019, https://arxiv.org/abs/1906.10771
    hessian        ½ Σ (a·g)²                 second order, the diagonal of the Fisher matrix in place of the Hessian's:
                                              LeCun et al. 1989, "Optimal Brain Damage"; Theis et al. 2018, 1801.05787

A head is all of its channels; a channel of the residual stream is summed over all blocks (Minitron: norms' outputs).
Differs from Minitron in the aggregation: one root mean square over all tokens of all windows.

Cost: one pass for activation and contribution; taylor and hessian a pass forth and back, with the hidden states of all
blocks kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fettle.methods.reshape.subject import States, Subject
from fettle.methods.reshape.widths import READERS, HeadShape, attention_of, head_shape, neuron_groups
from fettle.models.anatomy import Block, Linear
from fettle.models.skeleton import ProductTap, Skeleton, Tap
from fettle.models.storage import read_weight

Score = Literal["contribution", "activation", "magnitude", "taylor", "hessian"]


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """A figure for each unit, the larger the more it is missed; float64.

    Attributes:
        neurons: name of the matrix that reads them → [neurons].
        heads: name of the output matrix → [query heads].
        hidden: [channels].
    """

    neurons: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor


def unit_scores(subject: Subject, by: Score) -> UnitScores:
    """Scores of every unit of the model."""
    if by == "magnitude":
        return _magnitudes(subject)
    if by in ("activation", "contribution"):
        return _activations(subject, weighted=by == "contribution")
    subject.require_predictions(by)
    return _gradients(subject, _first_order if by == "taylor" else _second_order)


def _width(subject: Subject) -> int:
    assert subject.anatomy.embedding is not None
    return subject.anatomy.embedding.shape[1]


def _read_units(block: Block) -> list[Linear]:
    """The matrices of a block whose inputs are neurons or heads."""
    return [down for down, _ in neuron_groups(block)] + [attention_of(block)[0]]


# ---- weights alone


def _magnitudes(subject: Subject) -> UnitScores:
    shape = head_shape(subject)
    found = UnitScores(hidden=torch.zeros(_width(subject), dtype=torch.float64))

    def squares(linear: Linear, dim: int) -> Tensor:
        return read_weight(subject.checkpoint, linear).double().square().sum(dim)

    if subject.anatomy.embedding is not None:
        found.hidden.add_(squares(subject.anatomy.embedding, 0))
    for block in subject.anatomy.blocks:
        for down, before in neuron_groups(block):
            total = squares(down, 0)
            for linear in before:
                rows = squares(linear, 1)
                total = total + (rows.view(2, -1).sum(0) if linear.role == "gate_up" else rows)
            found.neurons[down.name] = total.sqrt()
        output, before = attention_of(block)
        heads = _by_head(squares(output, 0), shape)
        for linear in before:
            heads = heads + _rows_by_head(squares(linear, 1), linear.role, shape)
        found.heads[output.name] = heads.sqrt()
        for linear in block.linears:
            if linear.role in READERS or linear.role in ("output", "down", "expert_down"):
                found.hidden.add_(squares(linear, 0 if linear.role in READERS else 1))
    return UnitScores(neurons=found.neurons, heads=found.heads, hidden=found.hidden.sqrt())


def _rows_by_head(rows: Tensor, role: str, shape: HeadShape) -> Tensor:
    """Sums of rows for each query head; a key-value head counts a part for each of the heads that read it."""
    q, kv = shape.heads * shape.size, shape.kv_heads * shape.size
    if role == "query":
        return _by_head(rows, shape)
    if role == "query_key_value" and len(rows) == q + 2 * kv:
        parts = zip(("query", "key", "value"), torch.split(rows, [q, kv, kv]), strict=True)
        return torch.stack([_rows_by_head(part, name, shape) for name, part in parts]).sum(0)
    if role == "query_key_value":  # no family of this kind has heads that can go: the score is never asked for
        return torch.zeros(shape.heads, dtype=rows.dtype)
    return (rows.view(shape.kv_heads, shape.size).sum(1) / shape.group).repeat_interleave(shape.group)


def _by_head(channels: Tensor, shape: HeadShape) -> Tensor:
    """Sums over the channels of each head: [heads · size] → [heads]."""
    return channels.view(shape.heads, shape.size).sum(1)


# ---- one pass forth


def _activations(subject: Subject, *, weighted: bool) -> UnitScores:
    shape = head_shape(subject)
    skeleton, hidden = subject.skeleton()
    channels = torch.zeros(_width(subject), dtype=torch.float64)
    neurons: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for index, block in enumerate(subject.anatomy.blocks):
        skeleton.load_block(index)

        def one(state: Tensor, index: int = index) -> tuple[Tensor, dict[str, Tensor]]:
            tap = Tap()
            return skeleton.run_block(index, state, tap), {group: x.cpu() for group, x in tap.inputs.items()}

        ran = subject.workers.map(one, hidden)
        hidden = [state for state, _ in ran]
        taken = [inputs for _, inputs in ran]
        for down, _ in neuron_groups(block):
            squares = _sum(taken, down, lambda x: x.double().square().sum(0))
            if weighted:
                squares = squares * skeleton.weight(down).double().square().sum(0).cpu()
            neurons[down.name] = squares.sqrt()
        output, _ = attention_of(block)
        weight = skeleton.weight(output).cpu() if weighted else None
        heads[output.name] = _sum(taken, output, lambda x, w=weight: _head_energy(x, w, shape)).sqrt()  # type: ignore[misc]
        for reader in {x.input_group: x for x in block.linears if x.role in READERS and x.expert is None}.values():
            channels += _sum(taken, reader, lambda x: x.double().square().sum(0)).sqrt()
        skeleton.free_block(index)
    return UnitScores(neurons=neurons, heads=heads, hidden=channels)


def _sum(taken: Sequence[Mapping[str, Tensor]], linear: Linear, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """`measure` of a linear's inputs [tokens, in], summed over the windows in order; zero for an unseen expert."""
    found = [measure(inputs[linear.input_group]) for inputs in taken if linear.input_group in inputs]
    if not found:
        return measure(torch.zeros(1, linear.shape[1]))
    total = found[0].clone()
    for part in found[1:]:
        total += part
    return total


def _head_energy(inputs: Tensor, weight: Tensor | None, shape: HeadShape) -> Tensor:
    """Σ over tokens of ‖a‖² of each head [heads], or of ‖W·a‖² with the output's weight."""
    parts = inputs.view(-1, shape.heads, shape.size)
    if weight is None:
        return parts.double().square().sum((0, 2))
    columns = weight.view(weight.shape[0], shape.heads, shape.size)
    sums = [(parts[:, h] @ columns[:, h].T).square().sum(dtype=torch.float64) for h in range(shape.heads)]
    return torch.stack(sums)


# ---- forth and back


def _first_order(products: Tensor) -> Tensor:
    """|Σ a·g| of one window, from a·g [tokens, units]."""
    return products.sum(0).abs()


def _second_order(products: Tensor) -> Tensor:
    return products.square().sum(0) / 2


def _gradients(subject: Subject, measure: Callable[[Tensor], Tensor]) -> UnitScores:
    shape = head_shape(subject)
    skeleton, hidden = subject.skeleton()
    states = [hidden]
    for index in range(len(subject.anatomy.blocks)):
        skeleton.load_block(index)
        states.append(subject.run_block(skeleton, index, states[-1]))
        skeleton.free_block(index)
    gradients = _at_the_head(subject, skeleton, states.pop())
    channels = torch.zeros(_width(subject), dtype=torch.float64)
    neurons: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for index in range(len(subject.anatomy.blocks) - 1, -1, -1):
        skeleton.load_block(index)
        block = subject.anatomy.blocks[index]
        entering = states.pop()
        passed = _through(subject, skeleton, block, entering, gradients)
        gradients = [gradient for gradient, _ in passed]
        for state, gradient in zip(entering, gradients, strict=True):
            channels += measure((state * gradient)[0].double().cpu())
        for linear in _read_units(block):
            products = [taken[linear.name] for _, taken in passed if linear.name in taken]
            scores = torch.zeros(shape.heads if linear.role == "output" else linear.shape[1], dtype=torch.float64)
            for product in products:
                by_unit = product.view(-1, shape.heads, shape.size).sum(2) if linear.role == "output" else product
                scores += measure(by_unit.double())
            (heads if linear.role == "output" else neurons)[linear.name] = scores
        skeleton.free_block(index)
    return UnitScores(neurons=neurons, heads=heads, hidden=channels)


def _at_the_head(subject: Subject, skeleton: Skeleton, final: States) -> States:
    """The gradient of each window's summed loss at the last block's output."""
    skeleton.load_head()

    def one(window: int) -> Tensor:
        with torch.enable_grad():
            state = final[window].detach().clone().requires_grad_(True)
            logits = skeleton.logits(state)[0, :-1].float()
            targets = subject.windows[window][1:].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            return torch.autograd.grad(loss, state)[0]

    found = subject.workers.map(one, range(len(final)))
    skeleton.free_head()
    return found


def _through(
    subject: Subject, skeleton: Skeleton, block: Block, entering: States, gradients: States
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Per window: the gradient at the block's input, and a·g [tokens, in] by the matrix that reads the units."""
    by_address = skeleton.linears_by_address(block.index)
    wanted = {address: found[0] for address, found in by_address.items() if found[0] in _read_units(block)}
    weights = {linear.name: skeleton.weight(linear) for linear in wanted.values()}

    def one(window: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.enable_grad():
            state = entering[window].detach().clone().requires_grad_(True)
            tap = ProductTap()
            output = skeleton.run_block(block.index, state, tap)
            seen = [(wanted[a], *p) for a, p in tap.products.items() if a in wanted and p[1].requires_grad]
            found = torch.autograd.grad(
                output, [state, *(product for _, _, product in seen)], gradients[window], allow_unused=True
            )
        taken = {}
        for (linear, inputs, product), gradient in zip(seen, found[1:], strict=True):
            if gradient is not None:
                at_inputs = gradient.reshape(-1, product.shape[-1]) @ weights[linear.name]
                taken[linear.name] = (inputs * at_inputs).cpu()
        return found[0], taken

    return subject.workers.map(one, range(len(entering)))
