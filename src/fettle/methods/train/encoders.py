"""Distillation of encoders (BERT, MiniLM): sentences in, vectors and states compared; there is no next token.

A window is one line of the text, begun and ended as the tokenizer begins and ends a sentence, and padded; what is
padding takes part in nothing. Of the signals (`signals.py`)

    sentences               between the mean vectors of both models
    relations, distances    between the mean vectors of the lines of a batch
    features                between the states of the words, by layer map
    values                  between the relations of the words' value vectors in the last block

are learned from. Without any of them asked for it is sentences and features, 1 each. TinyBERT (Jiao et al. 2020,
https://arxiv.org/abs/1909.10351) and MiniLM (Wang et al. 2020, https://arxiv.org/abs/2002.10957) distil masked
language models; ours has the sentence vector as its goal, and starts from the teacher's own blocks.

Cost: as for a decoder; a batch is cut to its longest line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fettle.errors import RecipeError, UsageError
from fettle.methods.train import signals
from fettle.methods.train.job import Learner, TrainJob
from fettle.methods.train.layer_search import looked_at
from fettle.methods.train.loop import Objective
from fettle.methods.train.named_teachers import load_teacher
from fettle.methods.train.options import LoopFields, SignalFields
from fettle.methods.train.outputs import shared_units, value_path
from fettle.methods.train.samples import check_samples
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.teachers import share_tokens
from fettle.methods.train.text_mix import TrainingText
from fettle.models.anatomy import Anatomy

KNOWN = ("sentences", "features", "relations", "distances", "values")
USUAL = {"sentences": 1.0, "features": 1.0}


def encoder_signals(asked: SignalFields) -> dict[str, float]:
    """Signal → weight for an encoder; the usual ones where none is asked for.

    `soft: 1` is the default of a field that decoders share, so it asks for nothing here; what was learned from is told.

    Raises:
        RecipeError: a signal of next tokens or of attention, several teachers, or kept answers.
    """
    usual_soft = next(item.default for item in dataclasses.fields(SignalFields) if item.name == "soft")
    found = {name: weight for name, weight in asked.weights().items() if (name, weight) != ("soft", usual_soft)}
    wrong = sorted(set(found) - set(KNOWN))
    if wrong:
        raise RecipeError(
            f"an encoder predicts no next token and is not taught {', '.join(wrong)}; allowed: {', '.join(KNOWN)}"
        )
    if len(asked.teachers()) > 1 or asked.teacher_top_k is not None:
        raise RecipeError("an encoder has one teacher, which runs along; name one, and leave out teacher_top_k")
    return found or USUAL


def refuse_sources(data: DataFields) -> None:
    """Raises RecipeError for sources that read or write next tokens."""
    given = [name for name in ("on_policy", "written", "adversarial") if getattr(data, name)]
    given += ["curriculum"] if data.curriculum != "none" else []
    if given:
        raise RecipeError(f"{', '.join(given)} need next tokens, which an encoder does not predict; leave them out")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What an encoder gave: the state after each block, [batch, tokens, width] each, and the last block's values."""

    hidden: tuple[Tensor, ...]
    values: Tensor | None


class ObservedEncoder:
    """An encoder that tells what the signals ask for."""

    def __init__(self, tree: nn.Module, anatomy: Anatomy, asked: Collection[str]) -> None:
        self.model, self.depth = tree, len(anatomy.blocks)
        self.units = partial(shared_units, tree, anatomy, asked)
        self._hidden, self._seen = "features" in asked, "values" in asked
        self._values: list[Tensor] = []
        if self._seen:
            module = tree.get_submodule(value_path(anatomy))
            module.register_forward_hook(lambda _, __, out: self._values.append(out))

    def __call__(self, input_ids: Tensor, mask: Tensor) -> Encoded:
        """Runs on int64 [batch, tokens] and their mask.

        Raises:
            UsageError: a model with a head, which gives no states.
        """
        self._values.clear()
        out: Any = self.model(input_ids=input_ids, attention_mask=mask.long(), output_hidden_states=self._hidden)
        states = getattr(out, "last_hidden_state", None)
        if states is None:
            raise UsageError("this encoder gives a head's output and no states; train the model below its head")
        hidden = tuple(out.hidden_states[1:]) if self._hidden else (states,)
        return Encoded(hidden=hidden, values=self._values.pop() if self._seen else None)


class EncoderDistillation(Objective):
    """Student, teacher and the weights of the signals."""

    def __init__(
        self, student: ObservedEncoder, teacher: ObservedEncoder, weights: Mapping[str, float],
        *, layers: list[int], padding: int, learner: Learner,
    ) -> None:  # fmt: skip
        """`layers`: for each of the student's, the teacher's; `padding`: that token; `learner`: for rates and steps."""
        super().__init__()
        self.student = student.model
        self.weights, self.layers, self.padding, self._learner = weights, layers, padding, learner
        self._observed = (student, teacher)  # in a tuple: the teacher is no part that learns or is saved
        self.projections = nn.ParameterList()
        self._relation_heads = 1

    def rates(self) -> dict[str, float]:
        """The learner's own."""
        return {f"student.{start}": factor for start, factor in self._learner.rates.items()}

    def begin(self, step: int, losses: Callable[[], Iterator[Tensor]]) -> None:
        """What the learner does before a step."""
        if self._learner.before_step is not None:
            self._learner.before_step(step, losses)

    def units(self) -> list[nn.Module]:
        """The student's."""
        return self._observed[0].units()

    def shared_out(self) -> None:
        """What the learner does then."""
        self._learner.shared_out()

    def fit_shapes(self, input_ids: Tensor) -> None:
        """Makes the projections that features need where widths differ.

        Raises:
            RecipeError: sentence vectors of two widths.
        """
        with torch.no_grad():
            ours, theirs = self._encoded(input_ids)[:2]
        width, wanted = ours.hidden[-1].shape[-1], theirs.hidden[-1].shape[-1]
        if width != wanted:
            if "sentences" in self.weights:
                raise RecipeError(
                    f"sentence vectors of {width} and {wanted} numbers have no cosine; use relations and features"
                )
            self.projections.extend(nn.Parameter(torch.eye(wanted, width)) for _ in self.layers)
        if ours.values is not None and theirs.values is not None:
            self._relation_heads = signals.shared_heads(ours.values.shape[-1], theirs.values.shape[-1])

    def forward(self, window: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """The weighted sum of the signals."""
        ours, theirs, mask = self._encoded(input_ids)
        vectors = signals.pooled(ours.hidden[-1], mask), signals.pooled(theirs.hidden[-1], mask)
        total = vectors[0].new_zeros(())
        for name, weight in self.weights.items():
            if name == "sentences":
                found = signals.sentence_error(*vectors)
            elif name == "relations":
                found = signals.similarity_error(*vectors)
            elif name == "distances":
                found = signals.distance_error(*vectors)
            elif name == "values":
                assert ours.values is not None and theirs.values is not None
                found = signals.value_relations_error(ours.values, theirs.values, self._relation_heads, mask)
            else:
                found = self._features(ours, theirs, mask)
            total = total + weight * found
        return {"loss": total}

    def _encoded(self, input_ids: Tensor) -> tuple[Encoded, Encoded, Tensor]:
        mask = input_ids != self.padding
        longest = int(mask.sum(1).max())
        ids, mask = input_ids[:, :longest], mask[:, :longest]
        with torch.no_grad():
            theirs = self._observed[1](ids, mask)
        return self._observed[0](ids, mask), theirs, mask

    def _features(self, ours: Encoded, theirs: Encoded, mask: Tensor) -> Tensor:
        errors = []
        for number, layer in enumerate(self.layers):
            projection = self.projections[number] if len(self.projections) else None
            errors.append(signals.features_error(ours.hidden[number], theirs.hidden[layer], projection, mask))
        return torch.stack(errors).mean()


def encoder_objective(
    learner: Learner, fields: tuple[SignalFields, LoopFields], text: TrainingText, job: TrainJob
) -> EncoderDistillation:
    """The objective of an encoder's training.

    Raises:
        RecipeError: signals that an encoder does not have.
        UsageError: another tokenizer than the teacher's.
    """
    (asked, loop), student = fields, learner.loaded
    weights = encoder_signals(asked)
    check_samples(weights, loop, held_back=len(text.held_back), each=1)
    name = job.teachers(asked)[0]
    teacher = load_teacher(name, device=job.device, generic=job.generic, causal=False)
    if not share_tokens(student.tokenizer, teacher.tokenizer):
        raise UsageError(f"{job.model} and {name} have different tokenizers, so their words cannot be compared")
    teacher.model.eval()
    depth = len(student.anatomy.blocks)
    made = EncoderDistillation(
        ObservedEncoder(student.model, student.anatomy, weights),
        ObservedEncoder(teacher.model, teacher.anatomy, weights),
        weights,
        layers=looked_at(asked, loop, depth, teacher, job.device) if "features" in weights else [],
        padding=student.tokenizer.pad_token_id,
        learner=learner,
    )
    made.fit_shapes(text.ids[:1].to(job.device))
    return made.to(job.device)
