"""Adapters by PEFT: a few new parameters learn beside a base that stays as it is, byte for byte.

    lora     W + (α / r) · B A                          Hu et al. 2021, https://arxiv.org/abs/2106.09685
    rslora   W + (α / √r) · B A                         Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    lora_xs  W + (α / r) · U R V, R alone learns        Bałazy et al. 2024, https://arxiv.org/abs/2405.17604
    lora_sb  the same between the gradient's directions Ponkshe et al. 2024, https://arxiv.org/abs/2411.19557
    dora     m · (W + (α / r) · B A) / ‖…‖              Liu et al. 2024, https://arxiv.org/abs/2402.09353
    ia3      keys, values and MLP inputs times a vector     Liu et al. 2022, https://arxiv.org/abs/2205.05638
    prompt   virtual tokens in front                    Lester et al. 2021, https://arxiv.org/abs/2104.08691
    prefix   virtual keys and values in every block     Li & Liang 2021, https://arxiv.org/abs/2101.00190
    bottleneck   two small layers behind each sublayer  Houlsby et al. 2019; fettle's own, see bottleneck.py

The base may be in full precision or stored as codes in any of fettle's schemes (QLoRA, Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314): the codes stay packed, and gradients pass through their product. What is written is
PEFT's own format; with `merge` it is instead a dense model, base and adapter as one, which a later stage of a chain may
quantize again (what that costs is measured on its files, like everything). A pruned base is healed inside its mask, and
keeps it when merged (masked_bases.py).

On a base of codes `start: residual` begins with what the codes lost of the original, at rank r, by one singular value
decomposition (LoftQ, Li et al. 2023, https://arxiv.org/abs/2310.08659, with one of its rounds) in place of zero. With
`start: eva` A begins as the main directions of each linear's inputs on the training text and B at zero (EVA, Paischer
et al. 2024, https://arxiv.org/abs/2410.07170, by PEFT, the rank left as it is everywhere).

Cost: the base once, as stored; of the adapter values, gradients and two moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fettle.data.windows import calibration_windows
from fettle.errors import RecipeError, UsageError
from fettle.layers import QuantizedLinear
from fettle.methods.train.adapter_files import check_adapter, require_all_taken, unfit, write_adapter, write_record
from fettle.methods.train.adapter_targets import (
    OUTSIDE,
    check_ranks,
    module_path,
    parsed_ranks,
    parsed_roles,
    require_mergeable,
    target_linears,
)  # fmt: skip
from fettle.methods.train.bottleneck import BottleneckModel, is_bottleneck, load_bottlenecks, write_bottleneck
from fettle.methods.train.cores import CORES, Bases, bases, hold_bases_, release_bases_, seeded
from fettle.methods.train.curve import checkpoints
from fettle.methods.train.job import Learner, TrainJob
from fettle.methods.train.lineage import moved
from fettle.methods.train.masked_bases import inside_masks_, masked_, stored_masks
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.sources.on_policy import resting
from fettle.methods.train.text_mix import learning_part, require_tokenizer
from fettle.methods.train.writing import write_trained
from fettle.models.anatomy import read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel, load
from fettle.models.parts import Linear
from fettle.models.source import resolve
from fettle.models.storage import read_weight

Kind = Literal["lora", "rslora", "dora", "lora_xs", "lora_sb", "ia3", "prompt", "prefix", "bottleneck"]
VIRTUAL = ("prompt", "prefix")
RANKED = ("lora", "rslora", "dora", *CORES)
EVA_WINDOWS = 32


@dataclass(frozen=True, kw_only=True)
class Adapter(LoopFields, SignalFields, DataFields):
    """A few new parameters beside an untouched base: LoRA and its kin, IA3, prompts, prefixes, bottlenecks."""

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Adapters (PEFT)"
    source: ClassVar[str] = "LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; the other kinds' in adapters.py"

    kind: Kind = field(default="lora", metadata={"help": "which adapter"})
    rank: int = field(default=8, metadata={"help": "of LoRA's matrices; width of a bottleneck", "minimum": 1})
    alpha: float = field(default=16.0, metadata={"help": "LoRA's α", "minimum": 0.0})
    dropout: float = field(default=0.0, metadata={"help": "of LoRA's inputs", "minimum": 0.0, "maximum": 0.99})
    virtual_tokens: int = field(default=16, metadata={"help": "of a prompt or prefix", "minimum": 1})
    targets: str = field(
        default="all",
        metadata={"help": "which matrices get one: attention, mlp, all (of the blocks), or roles, head, embedding"},
    )
    ranks: str | None = field(
        default=None, metadata={"help": "LoRA's ranks that differ from rank by target, as mlp=2,head=4"}
    )
    start: Literal["zero", "residual", "eva"] = field(
        default="zero",
        metadata={"help": "begin with nothing, with what the base's codes lost (LoftQ), or along the inputs (EVA)"},
    )
    merge: bool = field(default=False, metadata={"help": "write base and adapter as one dense model"})
    keep_zeros: bool = field(
        default=False, metadata={"help": "with merge: zeros of a pruned model stay zero; masks always do"}
    )
    hard: float = field(default=1.0, metadata={"help": "weight of the text's own next token", "minimum": 0.0})
    soft: float = field(default=0.0, metadata={"help": "weight of the teacher's probabilities", "minimum": 0.0})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "largest step size of AdamW", "minimum": 0.0, "maximum": 10.0}
    )

    def validate(self) -> None:
        """Checks that the fields fit together; RecipeError where not."""
        self.check_loop()
        self.check_signals()
        self.check_data(self, self)
        if self.kind in (*VIRTUAL, "bottleneck") and self.merge:
            raise RecipeError(f"a {self.kind} is no weight and cannot be merged; allowed: lora and its kin, ia3")
        if self.keep_zeros and not self.merge:
            raise RecipeError("keep_zeros is for what is merged; set merge: true, or leave it out")
        if self.kind in VIRTUAL and self.on_policy:
            raise RecipeError(f"on_policy writes with the tree, where a {self.kind} has no place; use lora")
        if self.kind in VIRTUAL and set(self.weights()) - {"hard", "soft", "logits"}:
            raise RecipeError(
                f"with {self.kind} the states of virtual tokens stand among the others; use hard and soft"
            )
        if self.kind == "prefix" and self.gradient_checkpointing:
            raise RecipeError(
                "a prefix is a cache of keys and values, which blocks that run again do not take; set "
                "gradient_checkpointing: false, or use lora"
            )
        roles = parsed_roles(self.targets)
        check_ranks(self.ranks, roles)
        if self.ranks is not None and self.kind not in RANKED:
            raise RecipeError(f"ranks={self.ranks} with kind={self.kind}, which has none; allowed: {', '.join(RANKED)}")
        outside = [role for role in roles if role in OUTSIDE]
        if outside and (self.kind not in RANKED or self.start != "zero"):
            raise RecipeError(
                f"targets={self.targets!r} names {outside[0]}, where kind={self.kind} with start={self.start} has no "
                f"place; allowed there: {', '.join(RANKED)}, with start: zero"
            )
        if self.start != "zero" and self.kind not in ("lora", "rslora"):
            raise RecipeError(f"start={self.start} is LoRA's, got kind={self.kind}; use lora or rslora, or start: zero")

    def learner(self, job: TrainJob) -> Learner:
        """The base with a fresh adapter, which alone learns."""
        loaded = load(job.model, device=job.device, generic=job.generic)
        if not loaded.anatomy.causal:
            raise UsageError(f"{job.model} is an encoder, and adapters here are a decoder's; train it by distill")
        with seeded(self.seed):
            return self._bottleneck(loaded, job) if self.kind == "bottleneck" else self._of_peft(loaded, job)

    def _of_peft(self, loaded: LoadedModel, job: TrainJob) -> Learner:
        if self.merge:
            require_mergeable(loaded, [module_path(linear) for linear, _ in self._linears(loaded)])
        peft = require_peft()
        masks = stored_masks(loaded, keep_zeros=self.keep_zeros) if self.merge else {}
        adaptable_(loaded.model)
        held = self._bases(loaded, job)
        model = wrapped(loaded.model, self._config(peft, loaded))
        hold_bases_(model, held)
        if self.start == "residual":
            _start_with_residual_(model, loaded, job)
        if self.start == "eva" and not checkpoints(job.folder):  # a checkpoint holds what it led to
            _start_with_inputs_(model, loaded, self)
        inside_masks_(model, masks)

        def write(record: dict[str, Any]) -> None:
            record = {**record, "parameters": learning(model)}
            release_bases_(model, held)
            if self.merge:
                with _no_warnings():
                    write_adapter(model, loaded.folder, job.folder / "adapter", record)
                how: dict[str, Any] = {"generic": job.generic, "keep_zeros": self.keep_zeros, "record": record}
                merge_adapter(job.model, job.folder / "adapter", job.output, **how)
            else:
                with _no_warnings():
                    write_adapter(model, loaded.folder, job.output, record)

        return Learner(loaded=loaded, model=model, write=write)

    def _bottleneck(self, loaded: LoadedModel, job: TrainJob) -> Learner:
        model = BottleneckModel(loaded)
        model.add("default", self.rank)

        def write(record: dict[str, Any]) -> None:
            write_bottleneck(model, "default", self.rank, job.output)
            write_record({**record, "parameters": learning(model)}, loaded.folder, job.output)

        return Learner(loaded=loaded, model=model, write=write)

    def _linears(self, loaded: LoadedModel) -> list[tuple[Linear, int]]:
        """The matrices that get LoRA, each with its rank, which is at most its smaller side."""
        ranks = parsed_ranks(self.ranks)
        found = target_linears(loaded, parsed_roles(self.targets))
        return [(linear, min(ranks.get(linear.role, self.rank), *linear.shape)) for linear in found]

    def _bases(self, loaded: LoadedModel, job: TrainJob) -> Bases:
        if self.kind not in CORES:
            return {}
        return bases(loaded, self._linears(loaded), self.kind, self, job.folder)

    def _config(self, peft: Any, loaded: LoadedModel) -> Any:
        if self.kind in VIRTUAL:
            cls = peft.PromptTuningConfig if self.kind == "prompt" else peft.PrefixTuningConfig
            return cls(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens)
        if self.kind == "ia3":
            scaled = [module_path(x) for x in target_linears(loaded, ("key", "value", "down"))]
            after = [module_path(x) for x in target_linears(loaded, ("down",))]
            return peft.IA3Config(task_type="CAUSAL_LM", target_modules=scaled, feedforward_modules=after)
        linears = self._linears(loaded)
        others = {module_path(linear): rank for linear, rank in linears if rank != self.rank}
        eva = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)} if self.start == "eva" else {}
        return peft.LoraConfig(
            **eva, task_type="CAUSAL_LM", r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout,
            use_rslora=self.kind == "rslora", use_dora=self.kind == "dora",
            target_modules=[module_path(linear) for linear, _ in linears], rank_pattern=others,
            alpha_pattern={} if self.kind == "rslora" else {k: self.alpha * v / self.rank for k, v in others.items()},
        )  # fmt: skip


class PackedBase(nn.Linear):
    """A linear of codes as PEFT wants to see one: an `nn.Linear` whose `weight` is decoded when it is read."""

    def __init__(self, packed: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.packed = packed

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values of the codes, a fresh float32 [out, in]."""
        return self.packed.dequantize()

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The packed linear's."""
        return self.packed.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The packed product."""
        found: Tensor = self.packed(inputs)
        return found


def require_peft() -> Any:
    """The library; UsageError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UsageError("adapters need the library peft; install it: pip install 'fettle-llm[adapters]'") from None
    return peft


def wrapped(tree: nn.Module, config: Any) -> Any:
    """The tree with a fresh adapter of PEFT's; only that learns. The tree's own modules are changed."""
    with _no_warnings():
        return require_peft().get_peft_model(tree, config)


def adaptable_(tree: nn.Module) -> None:
    """Shows PEFT every packed linear as an `nn.Linear`."""
    for path, module in list(tree.named_modules()):
        if isinstance(module, QuantizedLinear) and not path.endswith(".packed"):
            parent, _, leaf = path.rpartition(".")
            setattr(tree.get_submodule(parent), leaf, PackedBase(module))


def load_adapters(loaded: LoadedModel, adapters: Mapping[str, str | Path]) -> Any:
    """One base with several adapters by name, as a PEFT model; the first is active, `set_adapter(name)` chooses.

    Raises:
        UsageError: no adapter is given, PEFT is not installed, bottlenecks beside PEFT's.
        CheckpointError: a folder is no adapter, is damaged, or belongs to another base.
    """
    if not adapters:
        raise UsageError("no adapter is given; give at least one, as a name and its folder")
    for name, folder in adapters.items():
        if not name or "." in name:
            raise UsageError(f"an adapter cannot be called {name!r}; allowed: any word without a dot, as 'mine'")
        check_adapter(Path(folder), loaded.folder)
    own = [is_bottleneck(Path(folder)) for folder in adapters.values()]
    if all(own):
        return load_bottlenecks(loaded, {name: Path(folder) for name, folder in adapters.items()})
    if any(own):
        raise UsageError("bottleneck adapters and PEFT's cannot stand on one base together; load one kind")
    adaptable_(loaded.model)
    model: Any = loaded.model
    for name, folder in adapters.items():
        model = _adapted(model, name, Path(folder), loaded.folder)
    return model.eval()


def _adapted(model: Any, name: str, folder: Path, base: Path) -> Any:
    """The tree, or a PEFT model, with one more of PEFT's adapters; CheckpointError where it does not fit the base."""
    peft = require_peft()
    try:
        with _no_warnings():
            if isinstance(model, peft.PeftModel):
                model.load_adapter(str(folder), adapter_name=name)
            else:
                model = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever PEFT trips over
        raise unfit(folder, base, error) from error
    require_all_taken(model, name, folder, base)
    return model


def merge_adapter(
    model: str | Path, adapter: Path, output: Path, *, generic: bool = False, record: Mapping[str, Any] | None = None,
    keep_zeros: bool = False,
) -> None:  # fmt: skip
    """Writes base and adapter as one dense model; a base of codes is decoded for it.

    Pruned matrices keep their masks, and are stored with them; what the adapter would put there is lost
    (`masked_bases.py`). With `keep_zeros` the zeros of dense matrices stay zeros as well.

    Raises:
        CheckpointError: the adapter is damaged, or belongs to another base.
        UsageError: an adapter that is no weight, or PEFT is not installed.
    """
    loaded = load(model, generic=generic, dense=True)
    masks = stored_masks(loaded, keep_zeros=keep_zeros)
    told = check_adapter(adapter, loaded.folder)
    if is_bottleneck(adapter):
        raise UsageError(f"the adapter in {adapter} is a bottleneck, no change of weights, and cannot be merged")
    require_mergeable(loaded, told.get("target_modules") or ())
    adapted = _adapted(loaded.model, "default", adapter, loaded.folder)
    with _no_warnings():
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise UsageError(f"the adapter in {adapter} is no change of weights and cannot be merged")
        tree = adapted.merge_and_unload()
    checkpoint = Checkpoint.open(loaded.folder)
    anatomy = read_anatomy(checkpoint, generic=generic)
    write_trained(tree, checkpoint, anatomy, output, record or {"results": None}, codes=masked_(tree, anatomy, masks))


def learning(model: nn.Module) -> int:
    """How many parameters learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _start_with_residual_(model: Any, loaded: LoadedModel, job: TrainJob) -> None:
    """A and B from the singular values of original less base, so that base and adapter begin as near as rank r can be.

    Raises:
        RecipeError: the base is the original.
    """
    checkpoint = Checkpoint.open(resolve(job.original))
    anatomy = read_anatomy(checkpoint, generic=job.generic)
    if resolve(job.original) == loaded.folder:
        raise RecipeError("start=residual needs the model that the base was compressed from; begin a chain with it")
    why = moved(Checkpoint.open(loaded.folder))
    if why is not None:
        raise RecipeError(f"start=residual compares the base's weights with the original's, and {why}; use start: zero")
    for linear in loaded.anatomy.linears():
        module = loaded.model.get_submodule(module_path(linear))
        if not hasattr(module, "lora_A"):
            continue
        lost = (
            read_weight(checkpoint, anatomy.find(linear.name)).to(job.device) - module.get_base_layer().weight.float()
        )
        left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
        first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
        rank, scaling = min(first.shape[0], len(sizes)), module.scaling["default"]
        root = (sizes[:rank] / scaling).sqrt()
        with torch.no_grad():
            first[:rank] = root.unsqueeze(1) * right[:rank]
            second[:, :rank] = left[:, :rank] * root


def _start_with_inputs_(model: Any, loaded: LoadedModel, fields: LoopFields) -> None:
    """A from the main directions of the inputs on some windows of the training text, by PEFT."""
    from peft import initialize_lora_eva_weights

    require_tokenizer(loaded.tokenizer, loaded.folder)
    drawn = calibration_windows(
        loaded.tokenizer, learning_part(fields), windows=EVA_WINDOWS, length=fields.length, seed=fields.seed
    )
    device = next(model.parameters()).device
    batches = [{"input_ids": ids.unsqueeze(0).to(device)} for ids in drawn.ids]
    with _no_warnings(), resting(model):
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def _no_warnings() -> Any:
    """PEFT's advice about vocabularies and base names, which here are as they should be."""
    import warnings

    return cast(Any, warnings.catch_warnings(action="ignore"))
