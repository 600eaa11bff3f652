"""LoRA between bases that stay: an r × r core learns, so that rank 24 has as few trainable numbers as rank 1 has.

    W + s · U R V       U [out, r] and V [r, in] stay as they begin, R [r, r] learns from zero

    lora_xs   U Σ and V are W's own main singular vectors       Bałazy et al. 2024, https://arxiv.org/abs/2405.17604
    lora_sb   U and V are those of the signs of the loss's      Ponkshe et al. 2024, https://arxiv.org/abs/2411.19557
              gradient by W, which is AdamW's first step, on
              GRADIENT_WINDOWS windows of the training text

Where the new domain pulls is seen in one gradient; how far to go there, and how the directions mix, is what is
trained. Theirs start R at what comes nearest to the first step of full fine-tuning, ours at zero, so that the model
begins as the base. The gradient is that of the text's own next tokens, also where a teacher is learned from.

What is written is PEFT's LoRA, B = U R, which every reader of PEFT takes; so its file is as large as LoRA's of that
rank, and only the trainable parameters are few. Bases are kept in the run's folder: a resumed run needs the same ones.

Cost at the start: for lora_sb a forward and a backward pass over the windows, and one gradient a matrix in memory; for
both a randomized singular value decomposition of each (`torch.svd_lowrank`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fettle.data.windows import calibration_windows
from fettle.methods.train.adapter_targets import module_path
from fettle.methods.train.identity import settle_identity
from fettle.methods.train.kept import keep, recall
from fettle.methods.train.options import LoopFields
from fettle.methods.train.text_mix import learning_part, require_tokenizer
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel
from fettle.models.parts import Linear

Bases = dict[str, tuple[Tensor, Tensor]]
CORES = ("lora_xs", "lora_sb")
GRADIENT_WINDOWS = 32
BASES, BASES_OF = "bases.safetensors", "bases.json"
ITERATIONS = 4  # of svd_lowrank's subspace


class InBasis(nn.Module):
    """B [out, r] as U R: the parametrization of PEFT's second matrix."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)
        self.basis: Tensor

    def forward(self, core: Tensor) -> Tensor:
        """U R, [out, r]."""
        return self.basis @ core

    def right_inverse(self, matrix: Tensor) -> Tensor:
        """The core that a fresh adapter begins with, zero [r, r]."""
        return matrix.new_zeros(matrix.shape[1], matrix.shape[1])


def bases(
    loaded: LoadedModel, linears: Sequence[tuple[Linear, int]], kind: str, fields: LoopFields, folder: Path
) -> Bases:
    """Module path → U [out, r] and V [r, in], for matrices with their ranks.

    Read from `folder` where a run has made them before. The embedding counts as a matrix [hidden, vocabulary], as PEFT
    adapts it.

    Raises:
        UsageError: `folder` holds those of another kind, rank, seed, text or model.
    """
    path = folder / BASES
    told = {
        "kind": kind, "ranks": {module_path(linear): rank for linear, rank in linears}, "seed": fields.seed,
        "length": fields.length, "text": learning_part(fields).sha256,
        "model": Checkpoint.open(loaded.folder).file_hashes(),
    }  # fmt: skip
    settle_identity(folder, told, "the bases", BASES_OF)
    if not path.is_file():
        with seeded(fields.seed):
            found = _found(loaded, linears, kind, fields)
        folder.mkdir(parents=True, exist_ok=True)
        keep(folder, BASES, found)
    device = next(loaded.model.parameters()).device
    stored = {name: tensor.to(device) for name, tensor in recall(path, _shapes(linears)).items()}
    return {
        where: (stored[f"{where}.left"], stored[f"{where}.right"])
        for where in (module_path(linear) for linear, _ in linears)
    }


def _shapes(linears: Sequence[tuple[Linear, int]]) -> dict[str, torch.Size]:
    """Of the bases of these matrices; the embedding's is turned."""
    found: dict[str, torch.Size] = {}
    for linear, rank in linears:
        rows, columns = linear.shape if linear.role != "embedding" else linear.shape[::-1]
        found[f"{module_path(linear)}.left"] = torch.Size([rows, rank])
        found[f"{module_path(linear)}.right"] = torch.Size([rank, columns])
    return found


def _found(
    loaded: LoadedModel, linears: Sequence[tuple[Linear, int]], kind: str, fields: LoopFields
) -> dict[str, Tensor]:
    sources = _sources(loaded, [linear for linear, _ in linears], kind, fields)
    found: dict[str, Tensor] = {}
    for linear, rank in linears:
        left, sizes, right = main_directions(sources.pop(module_path(linear)), rank)
        found[f"{module_path(linear)}.left"] = left * sizes if kind == "lora_xs" else left
        found[f"{module_path(linear)}.right"] = right
    return found


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, chance begins at `seed`; behind it, the caller's goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def main_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples, about: U [out, r] with orthonormal columns, Σ [r], V [r, in]."""
    q = min(2 * rank, *matrix.shape)
    left, sizes, right = torch.svd_lowrank(matrix.float(), q=q, niter=ITERATIONS)
    return left[:, :rank].contiguous(), sizes[:rank].contiguous(), right[:, :rank].T.contiguous()


def hold_bases_(model: nn.Module, found: Bases) -> None:
    """PEFT's LoRA with these bases: A becomes V and stays, B becomes U R, of which R alone learns."""
    for path, (left, right) in found.items():
        for holder, key, first in _places(model, path):
            with torch.no_grad():
                first.copy_(right)
            first.requires_grad_(False)
            parametrize.register_parametrization(holder, key, InBasis(left))


def release_bases_(model: nn.Module, found: Bases) -> None:
    """Every B as a plain matrix again, U R."""
    for path in found:
        for holder, key, _ in _places(model, path):
            parametrize.remove_parametrizations(holder, key, leave_parametrized=True)


def loss_gradients(loaded: LoadedModel, linears: Sequence[Linear], fields: LoopFields) -> dict[str, Tensor]:
    """Module path → the gradient of the next token's loss by that matrix, float32 [out, in], summed over some windows.

    From the inputs and the outputs' gradients of the modules, so codes and tied matrices have one, too: a head's own
    share, an embedding's own share, transposed to [hidden, vocabulary].
    """
    require_tokenizer(loaded.tokenizer, loaded.folder)
    drawn = calibration_windows(
        loaded.tokenizer, learning_part(fields), windows=GRADIENT_WINDOWS, length=fields.length, seed=fields.seed
    )
    sums: dict[str, Tensor] = {}
    tree: Any = loaded.model
    handles = [tree.get_input_embeddings().register_forward_hook(_differentiable)]
    for linear in linears:
        module = loaded.model.get_submodule(module_path(linear))
        handles.append(module.register_forward_hook(_gathering(sums, linear)))
    device = next(tree.parameters()).device
    try:
        for ids in drawn.ids:
            window = ids.unsqueeze(0).to(device)
            logits = tree(input_ids=window, use_cache=False).logits[0, :-1].float()
            nn.functional.cross_entropy(logits, window[0, 1:]).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _differentiable(module: nn.Module, inputs: Any, states: Tensor) -> Tensor:
    """The embedding's rows, from which on gradients are wanted, though no parameter of the base learns."""
    return states if states.requires_grad else states.requires_grad_(True)


def _gathering(sums: dict[str, Tensor], linear: Linear) -> Any:
    path = module_path(linear)

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], states: Tensor) -> None:
        read = inputs[0].detach()

        def add(gradient: Tensor) -> None:
            flat = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            if linear.role == "embedding":
                total = sums.setdefault(path, flat.new_zeros(flat.shape[1], linear.shape[0]))
                total.index_add_(1, read.reshape(-1), flat.T)
            else:
                product = flat.T @ read.reshape(-1, read.shape[-1]).float()
                sums[path] = sums[path].add_(product) if path in sums else product

        states.register_hook(add)  # type: ignore[no-untyped-call]

    return seen


def _sources(loaded: LoadedModel, linears: Sequence[Linear], kind: str, fields: LoopFields) -> dict[str, Tensor]:
    if kind == "lora_xs":
        return _weights(loaded, linears)
    return {path: gradient.sign() for path, gradient in loss_gradients(loaded, linears, fields).items()}


def _weights(loaded: LoadedModel, linears: Sequence[Linear]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for linear in linears:
        module: Any = loaded.model.get_submodule(module_path(linear))
        weight = module.weight.detach().float()
        turned = linear.role == "embedding" or linear.slot.transposed
        found[module_path(linear)] = weight.T if turned else weight
    return found


def _places(model: nn.Module, path: str) -> list[tuple[nn.Module, str, Tensor]]:
    """Where PEFT keeps B (a module and the name in it), and its A, at one place of the tree."""
    layer: Any = model.get_submodule(f"base_model.model.{path}")
    if "default" in layer.lora_embedding_A:
        return [(layer.lora_embedding_B, "default", layer.lora_embedding_A["default"])]
    return [(layer.lora_B["default"], "weight", layer.lora_A["default"].weight)]
