"""Several teachers of one vocabulary as one: the log of a weighted mean of their probabilities stands for its logits.

    log Σ_i w_i softmax(z_i / T), times T         at the temperature T at which it is compared

w sums up to one over the teachers. Where it comes from (`teacher_weighting`), with v the given weights, L_i the
teacher's mean loss on the text's own tokens and D_i its mean KL(p̄, p_i) from the plain mean p̄ of all teachers:

    fixed       w_i = v_i
    loss        w_i ∝ v_i · (1 - exp(L_i) / Σ_j exp(L_j))     confidence-aware, Zhang et al. 2022, equation 2,
                                                             https://arxiv.org/abs/2201.00007
    agreement   w_i ∝ v_i · exp(-D_i)                         ours: who stands alone counts less

They are taken a sample at a time (of the window at hand), or a task at a time: of all windows that were drawn from the
same text (the text, the replayed one, the teachers' own), measured once before the first step and kept on disk. A
window that belongs to no text, or to one of which no window was drawn, has the mean over tasks.

Cost: a forward pass of each teacher; by task another one for every window, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fettle.methods.train.kept import recall_json
from fettle.methods.train.options import Weighting
from fettle.methods.train.outputs import Outputs
from fettle.methods.train.teachers import Teacher
from fettle.methods.train.text_mix import TrainingText
from fettle.models.writer import write_json
from fettle.progress import Progress

KEPT = "teacher_weights.json"


class Several:
    """Teachers as one."""

    def __init__(
        self, teachers: Sequence[Teacher], weights: Sequence[float], temperature: float, weighting: Weighting = "fixed"
    ) -> None:
        self.teachers, self.temperature, self.weighting = teachers, temperature, weighting
        self._given = torch.tensor([math.log(weight) for weight in weights])
        self._by_window: Tensor | None = None  # [windows + 1, teachers], the last for what no text holds

    def __call__(self, input_ids: Tensor, window: Tensor | None = None) -> Outputs:
        """Logits alone; without the windows' numbers, weights are those of the samples."""
        logs = torch.stack(
            [torch.log_softmax(t(input_ids).logits.float() / self.temperature, -1) for t in self.teachers]
        )
        if self.weighting == "fixed":
            weights = self._given.expand(len(input_ids), -1)
        elif self._by_window is not None and window is not None:
            weights = self._weights(self._by_window[window.cpu()])
        else:
            weights = self._weights(self._measure(logs, input_ids))
        weighted = logs + weights.T[:, :, None, None].to(logs.device)
        return Outputs(logits=weighted.logsumexp(0) * self.temperature)

    def weights(self, measures: Tensor) -> Tensor:
        """Weights [samples, teachers], which sum up to one, from what was measured."""
        return self._weights(measures).exp()

    def measure(self, input_ids: Tensor) -> Tensor:
        """What the weights follow from, for each sample and teacher [batch, teachers]: losses, or distances."""
        logs = torch.stack(
            [torch.log_softmax(t(input_ids).logits.float() / self.temperature, -1) for t in self.teachers]
        )
        return self._measure(logs, input_ids)

    def settle_by_task(
        self, text: TrainingText, folder: Path, identity: dict[str, Any], progress: Progress, device: str = "cpu"
    ) -> None:
        """From here on weights are those of the task that a window belongs to."""
        told, path = {**identity, "text": text.sha256, "weighting": self.weighting}, folder / KEPT
        known = recall_json(path) if path.is_file() else {}
        tasks = torch.tensor(text.tasks or [0] * text.learned)
        if known.get("identity") != told:
            with progress.task("teachers weighed", text.learned) as task:
                found = []
                for ids in text.ids[: text.learned]:
                    found.append(self.measure(ids.unsqueeze(0).to(device)).cpu())
                    task.advance()
            measured = torch.cat(found)
            parts = [measured[tasks == number] for number in range(int(tasks.max()) + 1)]
            over_tasks = torch.stack([part.mean(0) for part in parts if len(part)]).mean(0)
            means = [part.mean(0) if len(part) else over_tasks for part in parts]  # all may be replayed
            folder.mkdir(parents=True, exist_ok=True)
            known = {"identity": told, "measures": [mean.tolist() for mean in means]}
            write_json(path, known)
        table = torch.tensor(known["measures"])
        rows = torch.cat([table[tasks], table[:1].expand(len(text.ids) - text.learned, -1)])  # held back: of the text
        self._by_window = torch.cat([rows, table.mean(0, keepdim=True)])

    def _measure(self, logs: Tensor, input_ids: Tensor) -> Tensor:
        """From log-probabilities [teachers, batch, tokens, vocab]."""
        if self.weighting == "agreement":
            mean = logs.logsumexp(0) - math.log(len(logs))
            return (mean.exp() * (mean - logs)).sum(-1).mean(-1).T.cpu()
        if self.temperature != 1.0:
            logs = torch.log_softmax(logs * self.temperature, -1)  # the text is judged as it is
        losses = [functional.nll_loss(log[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none") for log in logs]
        return torch.stack([loss.mean(-1) for loss in losses], -1).cpu()

    def _weights(self, measures: Tensor) -> Tensor:
        """Log-weights [batch, teachers]."""
        if self.weighting == "agreement":
            return torch.log_softmax(self._given - measures, -1)
        rest = torch.log1p(-torch.softmax(measures, -1).clamp_max(1 - 1e-6))
        return torch.log_softmax(self._given + rest, -1)
