"""Quantization-aware training: the weights and scales of codes learn, from the model before it was quantized.

A dense model starts from the nearest codes in searched ranges. A model that fettle already stored as codes (GPTQ's, or
learned rounding's) goes on from these: its scheme is kept, and the latent weights lean, inside the cells of the codes
that were chosen, to where the original's weights lie. The loss is that of distillation from the original
(LLM-QAT, Liu et al. 2023, https://arxiv.org/abs/2305.17888), so labels are not needed.

Inputs' codes learn beside them: with `activations: static` their scale as LSQ has it (`fake_inputs.py`); a dynamic
one is found on the spot, and the weights learn to live with it.

With `grid: ternary, granularity: tensor` (and inputs of 8 bits) it is BitNet b1.58's training, from a pretrained model;
`grid: binary` that of binary weights. With `begin: random` it is both from scratch: nothing of the model but its shape
is kept, and everything learns, embedding, head and norms included. What learns, and how: `fake_quantization.py`; of
vector codes: `fake_vectors.py`.

Cost: a training step with one more rounding of every weight, and the teacher's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from fettle.errors import RecipeError
from fettle.methods.quantize.fields import GridFields
from fettle.methods.quantize.sharing import choose_shared
from fettle.methods.train.fake_inputs import observed_inputs
from fettle.methods.train.fake_quantization import FakeLinear, FakeQuantizedLinear, check_scheme, leaning_start
from fettle.methods.train.fake_vectors import FakeVectorLinear
from fettle.methods.train.fresh import BEGIN_HELP, Begin, load_afresh
from fettle.methods.train.job import Learner, TrainJob
from fettle.methods.train.lineage import moved
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.writing import BEGUN_AFRESH, write_trained
from fettle.models.anatomy import Anatomy, read_anatomy
from fettle.models.checkpoint import Checkpoint
from fettle.models.loading import LoadedModel, load
from fettle.models.parts import Linear
from fettle.models.source import resolve
from fettle.models.storage import StoredScheme, read_quantized, read_weight, stored_schemes
from fettle.tensors.activations import InputScale
from fettle.tensors.quantized import QuantizedTensor
from fettle.tensors.scheme import Scheme
from fettle.tensors.vectors import VectorTensor
from fettle.tensors.weights import CompressedWeight


@dataclass(frozen=True, kw_only=True)
class Qat(LoopFields, SignalFields, DataFields, GridFields):
    """Codes and scales of all linears of the blocks, trained against the model before quantization."""

    name: ClassVar[str] = "qat"
    title: ClassVar[str] = "Quantization-aware training"
    source: ClassVar[str] = "LSQ, Esser et al. 2020, https://arxiv.org/abs/1902.08153; LLM-QAT; BitNet b1.58"

    scale_rule: Literal["learned", "mean"] | None = field(
        default=None,
        metadata={"help": "scales learn, or are the mean size of the weights; none: mean where ternary or binary"},
    )
    scale_rate: float = field(
        default=1.0, metadata={"help": "step size of the scales' logarithms, times the learning rate", "minimum": 0.0}
    )
    rate_in: Literal["weights", "levels"] = field(
        default="weights",
        metadata={"help": "what a rate counts: weights, or levels of codes (norms keep the rate as it is)"},
    )
    trains: Literal["codes", "blocks", "all"] | None = field(
        default=None,
        metadata={
            "help": "codes and scales alone; norms and biases of the blocks as well; or all, dense embedding and head "
            "included; none: blocks, from random weights all"
        },
    )
    begin: Begin = field(default="pretrained", metadata={"help": BEGIN_HELP})

    def validate(self) -> None:
        """Checks that the fields fit together; RecipeError where not."""
        self.check_loop()
        self.check_signals()
        self.check_data(self, self)
        GridFields.validate(self)
        check_scheme(self.scheme("float32"), self.rule)
        if self.begin == "random" and self.trains not in (None, "all"):
            raise RecipeError(
                f"trains={self.trains} would leave random weights as they are; allowed with begin: random: all"
            )
        if self.rate_in == "levels" and self.weight_decay > 0:
            raise RecipeError(
                f"weight_decay={self.weight_decay} draws weights to zero, and rate_in: levels counts their steps in "
                "levels; allowed: weight_decay: 0, or rate_in: weights"
            )

    @property
    def rule(self) -> Literal["learned", "mean"]:
        """The scales' rule, the grid's own where none is given."""
        if self.scale_rule is not None:
            return self.scale_rule
        return "mean" if self.grid in ("ternary", "binary") else "learned"

    @property
    def learned(self) -> Literal["codes", "blocks", "all"]:
        """Which parameters learn, where nothing is said what the beginning asks for."""
        return self.trains or ("all" if self.begin == "random" else "blocks")

    def learner(self, job: TrainJob) -> Learner:
        """The student with fake-quantized linears in its blocks."""
        checkpoint = Checkpoint.open(resolve(job.model))
        anatomy = read_anatomy(checkpoint, generic=job.generic)
        stored = stored_schemes(checkpoint, anatomy)
        if stored:
            self._refuse_beside_codes(str(job.model), anatomy, stored)
        loaded = self._loaded(job)
        linears = _trainable_linears(loaded, stored)
        original, inputs = _original_weights(job), self._first_input_scales(loaded, linears, stored)
        for linear in linears:
            self._swap_(loaded, checkpoint, linear, stored.get(linear.name), original, inputs.get(linear.name))
        self._mark_(loaded)
        storage = self._storage(stored, checkpoint)

        def write(record: dict[str, Any]) -> None:
            codes: dict[str, CompressedWeight] = {x.name: _module(loaded, x).quantized() for x in linears}
            codes |= _outside(checkpoint, anatomy, stored)
            begun = {BEGUN_AFRESH: True} if self.begin == "random" else {}
            write_trained(
                loaded.model, checkpoint, anatomy, job.output, {**record, **begun}, codes=codes, storage=storage
            )

        return Learner(loaded=loaded, model=loaded.model, write=write, rates=self._rates(loaded.model))

    def _loaded(self, job: TrainJob) -> LoadedModel:
        """The dense model, with its own weights or fresh ones."""
        if self.begin == "random":
            return load_afresh(resolve(job.model), self.seed, device=job.device, generic=job.generic)
        return load(job.model, device=job.device, generic=job.generic, dense=True)

    def _mark_(self, loaded: LoadedModel) -> None:
        """Marks what learns."""
        inside = tuple(block.name + "." for block in loaded.anatomy.blocks)
        swapped = {
            id(p)
            for m in loaded.model.modules()
            if isinstance(m, FakeLinear)
            for p in (m.weight, m.log_scale, m.inputs and m.inputs.log_scale)
        }
        for name, parameter in loaded.model.named_parameters():
            vector = self.learned == "blocks" and parameter.dim() == 1 and name.startswith(inside)
            whole = self.learned == "all" and parameter.is_floating_point()
            parameter.requires_grad_(id(parameter) in swapped or vector or whole)

    def _rates(self, tree: nn.Module) -> dict[str, float]:
        """Factors of the learning rate, by parameter."""
        found = {}
        for name, module in tree.named_modules():
            if isinstance(module, FakeLinear):
                found[f"{name}.log_scale"] = found[f"{name}.inputs.log_scale"] = self.scale_rate
                found[f"{name}.weight"] = module.level_gap if self.rate_in == "levels" else 1.0
        return found

    def _refuse_beside_codes(self, model: str, anatomy: Anatomy, stored: dict[str, StoredScheme]) -> None:
        """Raises RecipeError for a scheme beside the one that the codes have, and for what would not learn."""
        given = [f.name for f in fields(GridFields) if getattr(self, f.name) != f.default]
        given += ["scale_rule"] if self.scale_rule is not None else []  # a base's scales learn, as they are stored
        if given:
            raise RecipeError(f"{model} is stored as codes, whose scheme is kept; leave out {', '.join(given)}")
        outside = [x.name for x in (anatomy.embedding, anatomy.head) if x is not None and x.name in stored]
        if self.learned == "all" and outside:
            raise RecipeError(
                f"{model} has codes in {' and '.join(outside)}, and qat trains those of blocks alone; allowed: trains: "
                "codes, blocks"
            )

    def _storage(self, stored: dict[str, StoredScheme], checkpoint: Checkpoint) -> str:
        if stored:
            held = {found.storage for found in stored.values()}  # floats have one each, whatever is preferred
            return "int-quantized" if "int-quantized" in held and "pack-quantized" not in held else "pack-quantized"
        scheme = self.scheme(_dtype(checkpoint))
        return (
            "int-quantized"
            if scheme.activations and scheme.grid.is_uniform and scheme.grid.bits == 8
            else "pack-quantized"
        )

    def _first_input_scales(
        self, loaded: LoadedModel, linears: list[Linear], stored: dict[str, StoredScheme]
    ) -> dict[str, InputScale]:
        """What the observer finds on the training text, for a dense model whose inputs are to get a stored scale."""
        dtype = _dtype(Checkpoint.open(loaded.folder))
        if stored or not self.scheme(dtype).has_input_scale:
            return {}
        seen = observed_inputs(loaded, linears, self)
        return {name: self.input_scale({"input_range": found}, dtype=dtype) for name, found in seen.items()}

    def _swap_(
        self, loaded: LoadedModel, checkpoint: Checkpoint, linear: Linear, stored: StoredScheme | None,
        original: Callable[[Linear], Tensor | None], inputs: InputScale | None,
    ) -> None:  # fmt: skip
        path = linear.slot.parameter.removesuffix(".weight")
        module = cast(nn.Linear, loaded.model.get_submodule(path))
        if stored is None:
            scheme: Scheme = self.scheme(_dtype(checkpoint))
            weight = module.weight.detach().float()
            start = choose_shared(weight, scheme, clip="search") if self.rule == "learned" else None
            made: FakeLinear[Any] = FakeQuantizedLinear(weight, module.bias, scheme, self.rule, start, inputs)
        else:
            made = _going_on(read_quantized(checkpoint, linear, stored), module, linear, original(linear))
        parent, _, leaf = path.rpartition(".")
        setattr(loaded.model.get_submodule(parent), leaf, made)


def _going_on(found: CompressedWeight, module: nn.Linear, linear: Linear, original: Tensor | None) -> FakeLinear[Any]:
    """A linear that goes on from codes, whose weights lean to where the original's lie, if that is known."""
    device = module.weight.device
    if isinstance(found, VectorTensor):
        return FakeVectorLinear(found, module.bias, original).to(device)
    if not isinstance(found, QuantizedTensor):
        raise RecipeError(
            f"{linear.name} is stored as {found.scheme.describe()}, and qat trains codes alone; give it the original "
            "model, or one compressed with a method such as gptq or residual_codebooks"
        )
    check_scheme(found.scheme, "learned")
    weight = leaning_start(found, original).to(device)
    made = FakeQuantizedLinear(weight, module.bias, found.scheme, "learned", found.shared, found.input_scale)
    return made.to(device)


def _outside(checkpoint: Checkpoint, anatomy: Anatomy, stored: dict[str, StoredScheme]) -> dict[str, CompressedWeight]:
    """The codes of embedding and head, where the base has some: nothing of them learns, so they are written as read."""
    linears = [linear for linear in (anatomy.embedding, anatomy.head) if linear is not None and linear.name in stored]
    return {linear.name: read_quantized(checkpoint, linear, stored[linear.name]) for linear in linears}


def _dtype(checkpoint: Checkpoint) -> str:
    return str(checkpoint.dtype).removeprefix("torch.")


def _trainable_linears(loaded: LoadedModel, stored: dict[str, StoredScheme]) -> list[Linear]:
    """The linears of the blocks that get codes: all but routers, or those that have codes already.

    Raises:
        RecipeError: one that is no module of its own (experts, GPT-2's Conv1D).
    """
    wanted = [x for x in loaded.anatomy.linears() if (x.name in stored if stored else x.role != "router")]
    for linear in wanted:
        path = linear.slot.parameter.removesuffix(".weight")
        if linear.slot.index is not None or type(loaded.model.get_submodule(path)) is not nn.Linear:
            raise RecipeError(
                f"{linear.name} is no nn.Linear of its own in transformers, and qat trains those alone; this family "
                "cannot be trained so yet"
            )
    return wanted


def _module(loaded: LoadedModel, linear: Linear) -> FakeLinear[Any]:
    return cast(FakeLinear[Any], loaded.model.get_submodule(linear.slot.parameter.removesuffix(".weight")))


def _original_weights(job: TrainJob) -> Callable[[Linear], Tensor | None]:
    """A look-up of the same linear's weight in the model that the codes were made from, where it has one."""
    checkpoint = Checkpoint.open(resolve(job.original))
    anatomy = read_anatomy(checkpoint, generic=job.generic)
    if moved(Checkpoint.open(resolve(job.model))) is not None:
        return lambda linear: None
    twins = {} if stored_schemes(checkpoint, anatomy) else {linear.name: linear for linear in anatomy.linears()}

    def find(linear: Linear) -> Tensor | None:
        twin = twins.get(linear.name)
        return read_weight(checkpoint, twin) if twin is not None and twin.shape == linear.shape else None

    return find
