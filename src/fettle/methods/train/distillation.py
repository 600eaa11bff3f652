"""The objective of every method here: a student's loss, made of weighted signals.

    loss = Σ weight · signal(student, teacher)        signals: `signals.py`

Full training, quantization-aware training and adapters differ in which parameters of the student learn and in what is
written afterwards, not in this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fettle.errors import RecipeError
from fettle.methods.train import signals
from fettle.methods.train.kept_answers import KeptAnswers
from fettle.methods.train.loop import Objective
from fettle.methods.train.options import SignalFields
from fettle.methods.train.outputs import Observed, Outputs
from fettle.methods.train.sources.fields import DataFields
from fettle.methods.train.sources.mix import MADE
from fettle.methods.train.sources.on_policy import resting
from fettle.methods.train.teachers import Teacher


class Distillation(Objective):
    """Student, teacher and the weights of the signals."""

    def __init__(
        self, student: Observed, fields: SignalFields, *, teacher: Teacher | None = None,
        answers: KeptAnswers | None = None, layers: list[int] | None = None, learned: int | None = None,
    ) -> None:  # fmt: skip
        """`answers`: in the teacher's place; `layers`: for each of the student's, the teacher's that it looks at, where
        a signal goes by layer; `learned`: the first window that no step sees.
        """
        super().__init__()
        self.student = student.model
        self.fields = fields
        self._observed = (student,)  # in a tuple: neither it nor the teacher is a part that learns or is saved
        self._teacher, self._answers = (teacher,), answers
        self._layers = layers or []
        self.projections = nn.ParameterList()
        self._relation_heads = 1
        self._learned = learned
        self._text_share = 1.0 - (fields.on_policy if isinstance(fields, DataFields) else 0.0)

    @property
    def weights(self) -> dict[str, float]:
        """Signal → weight, of those that are learned from."""
        return self.fields.weights()

    def units(self) -> list[nn.Module]:
        """The student's."""
        return self._observed[0].units()

    def fit_shapes(self, input_ids: Tensor) -> None:
        """Looks at both models' widths once: makes the projections that features need, and checks that the signals can
        be compared.

        Raises:
            RecipeError: another vocabulary, or another number of layers than the map can use.
        """
        teacher, answers = self._teacher[0], self._answers
        if teacher is None and answers is None:
            return
        with torch.no_grad():
            ours = self._observed[0](input_ids)
            theirs = teacher(input_ids) if teacher is not None else None
        known = [answers.vocabulary] if answers is not None else []
        known += [theirs.logits.shape[-1]] if theirs is not None else []
        if known != [ours.logits.shape[-1]] * len(known):
            raise RecipeError(
                f"the student knows {ours.logits.shape[-1]} tokens and the teacher {known[0]}; they must have the same "
                "vocabulary"
            )
        if theirs is not None:
            self._fit(ours, theirs)

    def _fit(self, ours: Outputs, theirs: Outputs) -> None:
        """Projections and relation heads for two models' widths."""
        weights = self.fields.weights()
        if "features" in weights:
            for layer, state in enumerate(ours.hidden):
                width, wanted = state.shape[-1], theirs.hidden[self._layers[layer]].shape[-1]
                if width != wanted:
                    self.projections.append(nn.Parameter(torch.eye(wanted, width)))
        if ours.values is not None and theirs.values is not None:
            self._relation_heads = signals.shared_heads(ours.values.shape[-1], theirs.values.shape[-1])

    def forward(self, window: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """The weighted sum of the signals."""
        ours = self._observed[0](input_ids)
        weights = self.fields.weights()
        teacher = self._teacher[0]
        theirs = teacher(input_ids, window) if teacher is not None else None
        total = ours.logits.new_zeros((), dtype=torch.float32)
        for name, weight in weights.items():
            total = total + weight * self._signal(name, ours, theirs, window, input_ids)
        return {"loss": total}

    def _signal(self, name: str, ours: Outputs, theirs: Outputs | None, window: Tensor, input_ids: Tensor) -> Tensor:
        fields, predicted = self.fields, ours.logits[:, :-1]
        if name == "hard":
            return self._hard(predicted, window, input_ids)
        if self._answers is not None:
            indices, logs, rest = (part.to(predicted.device) for part in self._answers.rows(window))
            return signals.kept_labels(predicted, indices.long(), logs, rest, fields.temperature, fields.divergence)
        if theirs is None:
            raise RecipeError(f"{name} needs a teacher; name one with teacher:")
        wanted = theirs.logits[:, :-1]
        if name == "soft":
            return signals.soft_labels(predicted, wanted, fields.temperature, fields.divergence)
        if name == "logits":
            return signals.logits_error(predicted, wanted)
        if name == "relations":
            return signals.similarity_error(ours.samples(), theirs.samples())
        if name == "distances":
            return signals.distance_error(ours.samples(), theirs.samples())
        if name == "values":
            assert ours.values is not None and theirs.values is not None
            return signals.value_relations_error(ours.values, theirs.values, self._relation_heads)
        return self._by_layer(name, ours, theirs)

    def _hard(self, predicted: Tensor, window: Tensor, input_ids: Tensor) -> Tensor:
        """Of the windows of text: nobody learns its own mistakes as if they were text.

        The parts of a step hold unequal numbers of these. Each part is divided by what is its share of them over the
        run, so that the parts' mean is that of the step's text.
        """
        of_text = window != MADE
        if not of_text.any():
            return 0 * predicted.sum()
        found = signals.cross_entropy(predicted[of_text], input_ids[of_text, 1:])
        is_held_back = self._learned is not None and int(window.min()) >= self._learned  # no step's, and all text
        return found if is_held_back else found * of_text.float().mean() / self._text_share

    @torch.no_grad()
    def gap(self, window: Tensor, input_ids: Tensor) -> Tensor:
        """How far the two models' predictions are apart on each window, [batch], by the divergence of the soft labels.

        Args:
            window: int64 [batch].
            input_ids: int64 [batch, length].
        """
        device = next(self.parameters()).device
        with resting(self):
            found = []
            for one, ids in zip(window.unsqueeze(1), input_ids.to(device).unsqueeze(1), strict=True):
                theirs = None if self._teacher[0] is None else self._teacher[0](ids, one)
                found.append(self._signal("soft", self._observed[0](ids), theirs, one, ids))
        return torch.stack(found).cpu()

    def _by_layer(self, name: str, ours: Outputs, theirs: Outputs) -> Tensor:
        """Features or attention maps, mean over the student's layers."""
        if name == "attention":
            pairs = [(ours.attention[i], theirs.attention[layer]) for i, layer in enumerate(self._layers)]
            return torch.stack([signals.attention_error(*pair) for pair in pairs]).mean()
        errors = [
            signals.features_error(
                ours.hidden[i], theirs.hidden[layer], self.projections[i] if len(self.projections) else None
            )
            for i, layer in enumerate(self._layers)
        ]
        return torch.stack(errors).mean()
