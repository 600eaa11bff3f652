"""The original on a sample of text: its states at every block, its predictions, and the gradients that reach each
block.

    embed → blocks → head            forward: the hidden states that enter every block are kept
    labels drawn from the predictions → head → blocks, last to first
                                     backward: the gradient of the summed loss at every block's output is kept

From there any linear can be changed alone and the model run on from its block (`run_on`), and the KL to the original's
own predictions is measured (`kl`). The gradients serve the second-order estimate (`estimates.py`): labels that the
model draws itself make it one of the KL, whatever the text says.

Memory: (1 + draws) · tokens · hidden · 4 bytes a block; the blocks themselves stay loaded where they fit into half of
the free memory, else they are read again whenever they run. Neither changes a figure: windows are independent, and each
sum has one order for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from fettle.data.windows import Windows
from fettle.diagnose.estimates import Activations
from fettle.errors import ModelError, NonFiniteError, UsageError
from fettle.evaluate.quality import kl_divergence
from fettle.models.anatomy import Anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.skeleton import ProductTap, Skeleton
from fettle.workers import Workers

HEAD_LOGITS = 2**24  # logits made at once in each thread: 64 MB in float32
KEPT_LOGITS = 2**27  # log-probabilities of the original that are kept; more are made again each time
States = list[Tensor]  # one window each: [1, tokens, hidden]


class Original:
    """See the module's text; make it inside of a `Workers` context with gradients off."""

    def __init__(
        self, checkpoint: Checkpoint, anatomy: Anatomy, sample: Windows, *, device: str, workers: Workers,
        seed: int = 0, draws: int = 1,
    ) -> None:  # fmt: skip
        if not anatomy.causal or anatomy.head is None:
            raise UsageError(
                f"{checkpoint.folder} has no language-model head, so there are no predictions to compare; only causal "
                "language models can be diagnosed"
            )
        if not sample.ids:
            raise UsageError("there are no windows of text to measure; give a longer text")
        self.checkpoint, self.anatomy, self.sample, self.workers = checkpoint, anatomy, sample, workers
        self.skeleton = Skeleton.build(checkpoint, anatomy, device=device)
        self.tokens = sum(len(ids) - 1 for ids in sample.ids)
        self._loaded: set[int] = set()
        self._resident = 4 * sum(x.parameters for x in anatomy.linears()) <= psutil.virtual_memory().available // 2
        self._step = max(1, HEAD_LOGITS // anatomy.head.shape[0])
        self._kept: dict[tuple[int, int], Tensor] | None = (
            {} if self.tokens * anatomy.head.shape[0] <= KEPT_LOGITS else None
        )
        self.states: list[States] = [self.embed(sample)]
        self._forward()
        self.gradients: list[list[States]] = []  # by draw, by block (of its output), by window
        for draw in range(draws):
            self.gradients.append(self._backward(seed + draw * 1_000_003))

    @property
    def block_count(self) -> int:
        """How many blocks."""
        return len(self.anatomy.blocks)

    def embed(self, windows: Windows) -> States:
        """What enters the first block; also notes the masks and positions of windows of these lengths."""
        hidden = [self.skeleton.embed(ids) for ids in windows.ids]
        self.skeleton.free_head()
        return hidden

    def load(self, index: int) -> None:
        """Has the block in memory, as the files say it."""
        if index not in self._loaded:
            self.skeleton.load_block(index)
            self._loaded.add(index)

    def free(self, index: int) -> None:
        """Gives the block's memory back, unless all blocks stay."""
        if not self._resident and index in self._loaded:
            self.skeleton.free_block(index)
            self._loaded.discard(index)

    def run(self, index: int, hidden: Sequence[Tensor]) -> States:
        """Windows through one loaded block as it stands."""
        return self.workers.map(lambda state: self.skeleton.run_block(index, state), hidden)

    def run_on(self, index: int, variants: Sequence[States]) -> list[States]:
        """The outputs of block `index` through all blocks after it: what several changes of that block end in."""
        flat = [state for states in variants for state in states]
        for later in range(index + 1, self.block_count):
            self.load(later)
            flat = self.run(later, flat)
            self.free(later)
        width = len(self.sample.ids)
        return [flat[start : start + width] for start in range(0, len(flat), width)]

    def kl(self, variants: Sequence[States]) -> list[float]:
        """KL(original || changed), mean nats a token, from the last block's outputs of each variant."""
        pieces = [(states, window) for states in variants for window in range(len(self.sample.ids))]
        self.skeleton.load_head()
        sums = self.workers.map(lambda piece: self._window_kl(piece[0], piece[1]), pieces)
        width = len(self.sample.ids)
        return [sum(sums[start : start + width]) / self.tokens for start in range(0, len(sums), width)]

    def activations(self, index: int) -> dict[str, Activations]:
        """Inputs and output gradients of every linear of a loaded block, by the linear's name."""
        linears = self.skeleton.linears_by_address(index)
        by_draw = [self._block_backward(index, draw[index])[1] for draw in self.gradients]
        found = {}
        for address, sharing in linears.items():
            inputs = [w[address][0] for w in by_draw[0] if address in w]
            if not inputs and sharing[0].expert is None:
                raise ModelError(
                    f"no product with {sharing[0].weight_name} was seen while block {index} ran: this architecture "
                    "multiplies in a way that fettle does not recognise, so it cannot be diagnosed"
                )
            grads = [[w[address][1] for w in draw if address in w] for draw in by_draw]
            for linear in sharing:
                rows = slice(None) if linear.slot.rows is None else slice(*linear.slot.rows)
                empty = torch.zeros(0, linear.shape[1]), torch.zeros(len(by_draw), 0, linear.shape[0])
                found[linear.name] = Activations(
                    inputs=torch.cat(inputs) if inputs else empty[0],
                    gradients=torch.stack([torch.cat(g)[:, rows] for g in grads]) if inputs else empty[1],
                    tokens=self.tokens,
                )
        return found

    def _forward(self) -> None:
        for index in range(self.block_count):
            self.load(index)
            self.states.append(self.run(index, self.states[-1]))
            self.free(index)
            for window, state in enumerate(self.states[-1]):
                if not torch.isfinite(state).all():
                    raise NonFiniteError(
                        f"block {index} ({self.anatomy.blocks[index].name}) of {self.checkpoint.folder} turns window "
                        f"{window} into NaN or infinity; the files are damaged, or the model cannot compute this text"
                    )

    def _backward(self, seed: int) -> list[States]:
        """Gradients at the output of every block, for one draw of labels."""
        self.skeleton.load_head()
        windows = range(len(self.sample.ids))
        at_output = [self.workers.map(lambda window: self._head_gradient(window, seed), windows)]
        for index in range(self.block_count - 1, 0, -1):
            self.load(index)
            at_output.append(self._block_backward(index, at_output[-1])[0])
            self.free(index)
        return at_output[::-1]

    def _head_gradient(self, window: int, seed: int) -> Tensor:
        """The gradient of Σ -log p[label] at the last block's output; at the logits it is p - onehot(label)."""
        final = self.states[-1][window]
        gradient = torch.zeros_like(final)
        generator = torch.Generator().manual_seed(seed + 7919 * window)
        for part in self._parts(window):
            hidden = final[:, part].detach().clone().requires_grad_(True)
            logits = self.skeleton.logits(hidden)
            p = torch.softmax(logits.detach()[0].float(), dim=-1)
            labels = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
            at_logits = p.scatter_add_(1, labels, torch.full(labels.shape, -1.0, device=p.device))
            (found,) = torch.autograd.grad(logits, [hidden], grad_outputs=at_logits[None].to(logits.dtype))
            gradient[:, part] = found
        return gradient

    def _block_backward(self, index: int, gradients: States) -> tuple[States, list[dict[int, tuple[Tensor, Tensor]]]]:
        """Per window: the gradient at the block's input, and by weight address inputs and output gradients."""

        def one(window: int) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
            hidden = self.states[index][window].detach().clone().requires_grad_(True)
            tap = ProductTap()
            output = self.skeleton.run_block(index, hidden, tap)
            taken = {address: product for address, product in tap.products.items() if product[1].requires_grad}
            found = torch.autograd.grad(
                output, [hidden, *(product[1] for product in taken.values())], gradients[window], allow_unused=True
            )
            products = {}
            for (address, (inputs, product)), gradient in zip(taken.items(), found[1:], strict=True):
                filled = torch.zeros_like(product) if gradient is None else gradient
                products[address] = (inputs.cpu(), filled.reshape(-1, filled.shape[-1]).cpu())
            return found[0], products

        pieces = self.workers.map(one, range(len(self.sample.ids)))
        return [entering for entering, _ in pieces], [products for _, products in pieces]

    def _parts(self, window: int) -> list[slice]:
        """The positions of a window that predict a token, in pieces that the head can hold."""
        last = len(self.sample.ids[window]) - 1
        return [slice(start, min(start + self._step, last)) for start in range(0, last, self._step)]

    def _window_kl(self, states: States, window: int) -> float:
        total = 0.0
        for part in self._parts(window):
            log_q = torch.log_softmax(self.skeleton.logits(states[window][:, part])[0].float(), dim=-1)
            total += float(kl_divergence(self._log_p(window, part), log_q).sum())
        return total

    def _log_p(self, window: int, part: slice) -> Tensor:
        key = (window, part.start)
        kept = None if self._kept is None else self._kept.get(key)
        if kept is not None:
            return kept
        made = torch.log_softmax(self.skeleton.logits(self.states[-1][window][:, part])[0].float(), dim=-1)
        if self._kept is not None:
            self._kept[key] = made
        return made
