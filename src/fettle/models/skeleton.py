"""The transformers module tree without its weights: blocks come, run, and go.

What: the model's own code on the meta device (shapes, no memory). `embed` runs the model's forward up to its first
block; `load_block` gives one block real float32 parameters, `run_block` runs it, `free_block` takes them away. So the
memory of a run is one block, its activations and, for the head, the vocabulary's matrix.

How: every block in the tree is replaced by a `_Stand`, and the real blocks wait outside it. During `embed` the stands
note the arguments with which the model calls each block (masks by layer type, rotary embeddings), per sequence length,
and the last one ends the forward. For `head_inputs` and `logits` the model runs its own forward again with stands that
hand the given hidden states on, so final norm, head and soft caps are the model's own, and no family needs a line
here.

Why float32: bf16 products run forty times slower on CPUs without bf16 instructions, and an error measure should not
drown in rounding. Buffers (rotary frequencies, causal masks) are real from the start; only parameters are on meta.

Threads: `run_block`, `logits` and `head_inputs` may run at once in two threads; `embed` takes a lock, `load_block` and
`free_block` are the walk's own. Cost of `embed`: the embedding rows of the tokens at hand are read, never the whole
table.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor, nn

from fettle.errors import CheckpointError, UsageError
from fettle.models.anatomy import Anatomy, Block, Linear
from fettle.models.checkpoint import Checkpoint, check_finite
from fettle.models.module_tree import build_tree, parameter_of, part_of, place_parameter, release_parameters
from fettle.models.quantized_inputs import QuantizedInputs
from fettle.models.storage import StoredScheme, read_input_quantizer, read_weight, stored_schemes
from fettle.models.tap import Enough, ProductTap, Tap
from fettle.tensors.activations import InputQuantizer

__all__ = ["ProductTap", "Skeleton", "Tap"]

BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """Ends the model's forward once every block's arguments are known."""


class _Stand(nn.Module):
    """Stands in the tree where block `index` was."""

    def __init__(self, owner: Skeleton, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)  # no child module, or the tree would contain itself
        self.index = index

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["owner"]._stand_called(self.index, hidden, args, kwargs)


class Skeleton:
    """See the module docstring. Make it with `build`; tensors are float32 on `device`."""

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, model: nn.Module, device: torch.device) -> None:
        self.checkpoint, self.anatomy, self.model, self.device = checkpoint, anatomy, model, device
        self.stored: dict[str, StoredScheme] = stored_schemes(checkpoint, anatomy)
        self._blocks: list[nn.Module] = []
        self._replace_blocks()
        self._arguments: dict[int, list[BlockArguments]] = {}
        self._replaced: dict[str, Tensor] = {}  # embedding and head given by set_weight_, by tensor name
        self._groups: dict[int, dict[int, str]] = {}
        self._quantizers: dict[int, dict[int, InputQuantizer]] = {}  # by block and by the weight's address
        self._returns_tuple = anatomy.blocks_return_tuple
        self._call = threading.local()
        self._lock = threading.RLock()
        self._embedding_table: Tensor | None = None
        self._head_is_loaded = False

    @classmethod
    def build(cls, checkpoint: Checkpoint, anatomy: Anatomy, *, device: str | torch.device = "cpu") -> Skeleton:
        """The tree for `checkpoint`, parameters on meta. Raises `ModelError` when transformers cannot build it."""
        return cls(checkpoint, anatomy, build_tree(checkpoint, anatomy, torch.float32, device), torch.device(device))

    def _replace_blocks(self) -> None:
        for index, block in enumerate(self.anatomy.blocks):
            path, _, number = block.name.rpartition(".")
            siblings = self.model.get_submodule(path)
            self._blocks.append(siblings.get_submodule(number))
            setattr(siblings, number, _Stand(self, index))

    # ---- before the blocks

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """int64 ids [1, tokens] → hidden [1, tokens, hidden] that enters block 0; notes the blocks' arguments."""
        ids = ids.reshape(1, -1).to(self.device)
        with self._lock:
            self._load_outside()
            try:
                used, places = torch.unique(ids, return_inverse=True)  # sorted
                table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
                table.weight = nn.Parameter(self._embedding_rows(used), requires_grad=False)
                padding, table.padding_idx = table.padding_idx, None  # an index of the full table
                self._call.first, self._call.arguments, self._call.replay = None, {}, None
                try:
                    self.model(inputs_embeds=table(places.reshape(ids.shape)), **self._forward_options())
                except _Reached:
                    pass
                finally:
                    table.padding_idx = padding
            finally:
                table.weight = nn.Parameter(torch.empty_like(table.weight, device="meta"), requires_grad=False)
            noted = self._call.arguments
            self._arguments[ids.shape[1]] = [noted[index] for index in range(len(self._blocks))]
            hidden: Tensor = self._call.first
        return hidden

    def _forward_options(self) -> dict[str, Any]:
        return {"use_cache": False} if self.anatomy.causal else {}

    def _embedding_rows(self, used: Tensor) -> Tensor:
        """float32 [len(used), hidden]: the rows of the embedding that these token ids name."""
        linear = self.anatomy.embedding
        if linear is None:
            raise UsageError(
                "this model has no embedding that fettle can find; --generic cannot run it, only inspect it."
            )
        self.anatomy.require_rows(int(used[0]), int(used[-1]))
        whole = self._replaced.get(linear.weight_name, self._embedding_table)
        if whole is None and linear.name in self.stored:
            whole = self._embedding_table = self._read(linear)
        if whole is not None:
            return whole[used.to(whole.device)].to(self.device)
        rows = [self.checkpoint.read_rows(linear.weight_name, row, row + 1) for row in used.tolist()]
        return torch.cat(rows).to(self.device, torch.float32)

    def _load_outside(self) -> None:
        """Loads what lies outside the blocks and is small: position tables, norms, poolers; not the vocabulary."""
        vocabulary = {
            linear.weight_name for linear in (self.anatomy.embedding, self.anatomy.head) if linear is not None
        }
        code_names = {linear.name for linear in (self.anatomy.embedding, self.anatomy.head) if linear is not None}
        for name in self.anatomy.tensors:
            if name in vocabulary or (name.rpartition(".")[0] in code_names and name.rpartition(".")[2] != "bias"):
                continue
            self._place(self.anatomy.parameters[name], name)

    def _place(self, parameter: str, name: str) -> None:
        """Loads checkpoint tensor `name` into `parameter`, unless the tree has none or it is loaded already."""
        current = parameter_of(self.model, parameter)
        if current is None or not current.is_meta:
            return
        value = self.checkpoint.read(name)
        check_finite(name, value)
        if value.shape != current.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(value.shape)}, the model expects {list(current.shape)}."
            )
        place_parameter(self.model, parameter, value.to(self.device, torch.float32))

    def _stand_called(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        last = index == len(self._blocks) - 1
        replay = self._call.replay
        if replay is None:
            if index == 0:
                self._call.first = hidden
            self._call.arguments[index] = (args, kwargs)
            if last:
                raise _Reached
        result = replay if replay is not None and last else hidden
        return (result,) if self._returns_tuple else result

    # ---- the blocks

    @torch.no_grad()
    def load_block(self, index: int) -> None:
        """Gives block `index` its float32 parameters, read from the shards; codes are dequantized."""
        self._embedding_table = None
        block, module = self.anatomy.blocks[index], self._blocks[index]
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                place_parameter(module, name, torch.empty(parameter.shape, dtype=torch.float32, device=self.device))
        filled = self._fill(block)
        missing = [name for name, _ in module.named_parameters() if f"{block.name}.{name}" not in filled]
        if missing:
            raise CheckpointError(f"block {index} of {self.checkpoint.folder} has no tensor for {', '.join(missing)}.")
        self._groups[index] = self._addresses(block)

    def _fill(self, block: Block) -> set[str]:
        """Copies every tensor of `block` into the module; returns the parameters that got a value."""
        filled, done = set(), set()
        for linear in block.linears:
            self.set_weight_(linear, self._read(linear))
            self.set_inputs_(linear, read_input_quantizer(self.checkpoint, linear, self.stored.get(linear.name)))
            filled.add(linear.slot.parameter)
            done |= {
                name for name in block.tensors if name.startswith((f"{linear.name}.weight", f"{linear.name}.input_"))
            }
        for name in block.tensors:
            parameter = self.anatomy.parameters[name]
            target = self._block_parameter(block.index, parameter)
            if name in done or target is None:  # e.g. the causal mask that old checkpoints carry
                continue
            value = self.checkpoint.read(name)
            check_finite(name, value)
            if value.shape != target.shape:
                raise CheckpointError(
                    f"tensor {name!r} has shape {list(value.shape)}, the model expects {list(target.shape)}."
                )
            target.copy_(value)
            filled.add(parameter)
        return filled

    def _block_parameter(self, index: int, parameter: str) -> Tensor | None:
        return parameter_of(self._blocks[index], parameter.removeprefix(self.anatomy.blocks[index].name + "."))

    def _addresses(self, block: Block) -> dict[int, str]:
        """Address of each weight as the model passes it to a product → the group of its inputs."""
        return {address: linears[0].input_group for address, linears in self.linears_by_address(block.index).items()}

    def linears_by_address(self, index: int) -> dict[int, list[Linear]]:
        """Address of each weight of the loaded block → its linears: more than one where they are rows of one
        parameter.
        """
        found: dict[int, list[Linear]] = {}
        for linear in self.anatomy.blocks[index].linears:
            found.setdefault(self._address(linear), []).append(linear)
        return found

    def _address(self, linear: Linear) -> int:
        parameter = self.slot_parameter(linear)
        return (parameter if linear.slot.index is None else parameter[linear.slot.index]).data_ptr()

    def free_block(self, index: int) -> None:
        """Takes the memory of block `index` back."""
        self._groups.pop(index, None)
        self._quantizers.pop(index, None)
        release_parameters(self._blocks[index])

    def run_block(self, index: int, hidden: Tensor, tap: Tap | None = None) -> Tensor:
        """Hidden [1, tokens, hidden] through block `index`; `tap` gets what its matrices read.

        A graph for gradients is kept only for a hidden that requires them.
        """
        with torch.set_grad_enabled(hidden.requires_grad):
            return self.run_block_as_is(index, hidden, tap)

    def run_block_as_is(self, index: int, hidden: Tensor, tap: Tap | None = None) -> Tensor:
        """`run_block` with gradients recorded or not as torch is set; several threads may run it at once."""
        tokens = hidden.shape[1]
        if tokens not in self._arguments:
            raise UsageError(f"no window of {tokens} tokens was embedded, so the masks of that length are not known.")
        args, kwargs = self._arguments[tokens][index]
        quantizers = self._quantizers.get(index)
        with contextlib.ExitStack() as modes:
            if quantizers:
                modes.enter_context(QuantizedInputs(quantizers))
            if tap is not None:  # entered last, it sees the inputs as they came
                modes.enter_context(tap.watch(self._groups[index]))
            result = self._blocks[index](hidden, *args, **kwargs)
        self._returns_tuple = isinstance(result, tuple)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def inputs_of(self, index: int, hidden: Tensor, groups: frozenset[str]) -> dict[str, Tensor]:
        """What the matrices of these input groups read, [tokens, in] each, on CPU; runs the block only as far as
        needed.

        An expert that no token of this window reached has no entry.
        """
        tap = Tap(groups)
        with contextlib.suppress(Enough):
            self.run_block(index, hidden, tap)
        return {group: inputs.cpu() for group, inputs in tap.inputs.items()}

    # ---- single matrices

    def slot_parameter(self, linear: Linear) -> Tensor:
        """The parameter of the loaded block in which a linear lies, shared with others where they are stacked."""
        assert linear.block is not None
        parameter = self._block_parameter(linear.block, linear.slot.parameter)
        if parameter is None:
            raise CheckpointError(f"the model built from config.json has no parameter {linear.slot.parameter!r}.")
        if parameter.is_meta:
            raise UsageError(f"block {linear.block} is not loaded, so {linear.name} has no weight in memory.")
        return parameter

    def _view(self, linear: Linear) -> Tensor:
        """The slot as a view [out, in] into the module's parameter."""
        return part_of(self.slot_parameter(linear), linear)

    def _read(self, linear: Linear) -> Tensor:
        weight = read_weight(self.checkpoint, linear, self.stored.get(linear.name))
        if tuple(weight.shape) != linear.shape:
            raise CheckpointError(
                f"{linear.name} is stored with shape {list(weight.shape)}, expected {list(linear.shape)}."
            )
        return weight

    @torch.no_grad()
    def weight(self, linear: Linear) -> Tensor:
        """A float32 copy [out, in] of what the slot holds now; embedding and head come from disk unless set."""
        if linear.block is None:
            kept = self._replaced.get(linear.weight_name)
            return (self._read(linear) if kept is None else kept.clone()).to(self.device)
        return self._view(linear).clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def set_weight_(self, linear: Linear, weight: Tensor) -> None:
        """Writes `weight` [out, in] into the slot; for embedding and head it is kept and used from now on."""
        if linear.block is None:
            self._replaced[linear.weight_name] = weight.to(self.device, torch.float32)
            self.free_head()
            return
        self._view(linear).copy_(weight)

    @torch.no_grad()
    def set_vector_(self, index: int, name: str, values: Tensor) -> None:
        """Writes values into checkpoint tensor `name` (a norm, a bias) of the loaded block."""
        parameter = self._block_parameter(index, self.anatomy.parameters[name])
        assert parameter is not None and not parameter.is_meta, name
        parameter.copy_(values)

    def set_inputs_(self, linear: Linear, quantizer: InputQuantizer | None) -> None:
        """From now on what `linear`, of the loaded block, reads passes through `quantizer`."""
        if quantizer is not None and linear.block is not None:
            self._quantizers.setdefault(linear.block, {})[self._address(linear)] = quantizer

    # ---- behind the blocks

    def load_head(self) -> None:
        """Loads final norm and head, float32; `logits` does it by itself."""
        with self._lock:
            if self._head_is_loaded:
                return
            self._load_outside()
            head, embedding = self.anatomy.head, self.anatomy.embedding
            if head is not None:
                place_parameter(self.model, head.slot.parameter, self.weight(head))
            elif embedding is not None and self._needs_vocabulary():
                place_parameter(self.model, embedding.slot.parameter, self.weight(embedding))
            self._tie()
            self._head_is_loaded = True

    def _needs_vocabulary(self) -> bool:
        """Whether an encoder's head (masked words) multiplies with the embedding."""
        assert self.anatomy.embedding is not None
        return self.anatomy.embedding.slot.parameter in self._ties().values()

    def _ties(self) -> dict[str, str]:
        ties = getattr(self.model, "all_tied_weights_keys", None) or {}
        return dict(ties)

    def _tie(self) -> None:
        for target, source in self._ties().items():
            for empty, full in ((target, source), (source, target)):
                current, other = parameter_of(self.model, empty), parameter_of(self.model, full)
                if current is not None and current.is_meta and other is not None and not other.is_meta:
                    place_parameter(self.model, empty, other)

    def free_head(self) -> None:
        """Takes the memory of everything outside the blocks back."""
        with self._lock:
            release_parameters(self.model)
            self._head_is_loaded = False
            self._embedding_table = None

    def _replay(self, module: nn.Module, hidden: Tensor) -> Any:
        """`module`'s own forward in which the last block returns `hidden`; gradients as in `run_block`."""
        self.load_head()
        self._call.replay = hidden
        try:
            with torch.set_grad_enabled(hidden.requires_grad):
                return module(inputs_embeds=torch.zeros_like(hidden), **self._forward_options())
        finally:
            self._call.replay = None

    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What the head reads: hidden [1, tokens, hidden] after the final norm, if there is one."""
        base = getattr(self.model, "base_model", self.model)
        output: Tensor = self._replay(base, hidden).last_hidden_state
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [1, tokens, vocab] from the last block's output. Raises `UsageError` for a model without a head."""
        result = self._replay(self.model, hidden)
        if getattr(result, "logits", None) is None:
            raise UsageError(
                f"{type(self.model).__name__} has no language-model head; use output() for its hidden states."
            )
        logits: Tensor = result.logits
        return logits

    def output(self, hidden: Tensor) -> Tensor:
        """The model's result [1, tokens, …]: logits if it has a head, else its last hidden state."""
        result = self._replay(self.model, hidden)
        logits = getattr(result, "logits", None)
        output: Tensor = result.last_hidden_state if logits is None else logits
        return output
