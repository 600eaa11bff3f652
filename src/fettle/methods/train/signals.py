"""What a student can learn from: each signal a pure function of what two models gave for the same tokens.

Per token, z the logits, p = softmax(z), T a temperature, y the next token, H states, A attention, V values:

    hard        -log p_s(y)
    soft        T² · D(softmax(z_t / T), softmax(z_s / T))        Hinton et al. 2015, https://arxiv.org/abs/1503.02531
                D forward: KL(p_t, p_s)   reverse: KL(p_s, p_t)   (MiniLLM, https://arxiv.org/abs/2306.08543)
                jensen_shannon: ½ KL(p_t, m) + ½ KL(p_s, m), m = ½ (p_t + p_s)   (GKD, https://arxiv.org/abs/2306.13649)
    logits      mean over the vocabulary of (z_s - z_t)², z centred    Ba & Caruana 2014, https://arxiv.org/abs/1312.6184
    features    mean of (H_s · Pᵀ - H_t)² over the mean of H_t², of each window     FitNets 2015, TinyBERT 2020
                (P learned, or none; the quotient is ours, so that depths weigh alike)
    attention   tokens · mean of (A_s - A_t)²                     TinyBERT, https://arxiv.org/abs/1909.10351
                (the factor is ours, so that lengths weigh alike)
    relations   mean of (S_s - S_t)², S the cosines between samples        after Tung & Mori 2019,
                (theirs: products of samples, each row divided by its length)       https://arxiv.org/abs/1907.09682
    distances   smooth L1 of d_s - d_t, d distances over their mean        RKD, Park et al. 2019, https://arxiv.org/abs/1904.05068
    values      KL(softmax(V_t V_tᵀ / √d), softmax(V_s V_sᵀ / √d))         MiniLM, https://arxiv.org/abs/2002.10957
    sentences   1 - cos(m_s, m_t), m the mean of an encoder's last states over the words    (Sentence-BERT's pooling,
                https://arxiv.org/abs/1908.10084; taught as in https://arxiv.org/abs/2004.09813, by cosine)

T² keeps the size of the gradient as T grows. Logits are centred, as softmax does not see their mean. Where only the
largest k of the teacher's logits are kept, the rest of the vocabulary is one more entry with their whole probability:
the divergence is then a lower bound of the whole one, and equal to it with k the vocabulary. All is in float32, also
where the models compute in bfloat16: products in here leave autocast. The teacher's side is data: no gradient flows
there.

Every signal but two is a mean over windows, each of them alike, so that the parts and processes that share a step add
up to the step. `relations` and `distances` compare samples with each other: the states of every 16th token
(`outputs.py`), or an encoder's sentences, of the windows that one process computes at once. Fewer of these are another
loss, and its curve is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Literal, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional

from fettle.errors import RecipeError

MOST_RELATION_HEADS = 12
LEAST_SAMPLES = {"relations": 2, "distances": 3}  # with fewer there is nothing that could differ
Divergence = Literal["forward", "reverse", "jensen_shannon"]
Given = ParamSpec("Given")


def _in_float32(signal: Callable[Given, Tensor]) -> Callable[Given, Tensor]:
    """The signal outside of autocast, which would take its products in fewer bits."""

    @wraps(signal)
    def outside(*args: Given.args, **kwargs: Given.kwargs) -> Tensor:
        student = args[0]
        assert isinstance(student, Tensor)
        with torch.autocast(student.device.type, enabled=False):
            return signal(*args, **kwargs)

    return outside


@_in_float32
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(label): logits [..., vocab], labels int64 [...]."""
    return functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


@_in_float32
def soft_labels(student: Tensor, teacher: Tensor, temperature: float, divergence: Divergence) -> Tensor:
    """T² · D of the two distributions, mean over tokens; logits [..., vocab], both."""
    ours = torch.log_softmax(student.float() / temperature, -1)
    theirs = torch.log_softmax(teacher.detach().float() / temperature, -1)
    return temperature**2 * _divergence(theirs, ours, divergence)


@_in_float32
def kept_labels(
    student: Tensor, indices: Tensor, kept: Tensor, rest: Tensor, temperature: float, divergence: Divergence
) -> Tensor:
    """`soft_labels` where the teacher is known by its k largest logits and by what the others come to.

    Args:
        student: logits [..., vocab].
        indices: int64 [..., k], which entries of the vocabulary are kept.
        kept: float32 [..., k], the log-probabilities of those at this temperature.
        rest: float32 [...], the log of the others' whole probability at this temperature; -inf where k is everything.
        temperature: that of the kept ones.
        divergence: which one.
    """
    whole = torch.log_softmax(student.float() / temperature, -1)
    chosen = whole.gather(-1, indices)
    others = whole.scatter(-1, indices, torch.full_like(chosen, -torch.inf))
    everything = indices.shape[-1] == student.shape[-1]
    if everything:
        return temperature**2 * _divergence(kept.detach(), chosen, divergence)
    ours = torch.cat([chosen, others.logsumexp(-1, keepdim=True)], -1)
    theirs = torch.cat([kept, rest.unsqueeze(-1)], -1).detach()
    return temperature**2 * _divergence(theirs, ours, divergence)


def _divergence(theirs: Tensor, ours: Tensor, divergence: Divergence) -> Tensor:
    """Of log-probabilities [..., n], mean over tokens."""
    if divergence == "forward":
        return _kl(theirs, ours)
    if divergence == "reverse":
        return _kl(ours, theirs)
    middle = torch.logaddexp(theirs, ours) - torch.log(torch.tensor(2.0))
    return (_kl(theirs, middle) + _kl(ours, middle)) / 2


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Mean over tokens of Σ p log(p / q), from log p and log q [..., n]; 0 · log 0 is 0."""
    return _kl_by_token(first, second).mean()


def _kl_by_token(first: Tensor, second: Tensor) -> Tensor:
    gap = torch.where(first == -torch.inf, torch.zeros_like(first), first - second)
    return (first.exp() * gap).sum(-1)


@_in_float32
def logits_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of centred logits [..., vocab]."""
    ours, theirs = student.float(), teacher.detach().float()
    return functional.mse_loss(ours - ours.mean(-1, keepdim=True), theirs - theirs.mean(-1, keepdim=True))


@_in_float32
def features_error(
    student: Tensor, teacher: Tensor, projection: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean squared difference of states, over the teacher's mean square, so that depths weigh alike; mean over windows.

    Args:
        student: [..., tokens, width].
        teacher: [..., tokens, teacher width].
        projection: [teacher width, width], learned along; None where the widths agree.
        mask: bool [..., tokens], which are words; None where all are.
    """
    ours = student.float() if projection is None else student.float() @ projection.float().T
    theirs = teacher.detach().float()
    errors, sizes = (ours - theirs).square().mean(-1), theirs.square().mean(-1)
    return (_over_words(errors, mask) / _over_words(sizes, mask).clamp_min(1e-12)).mean()


def _over_words(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of [..., tokens] over the tokens, those of the mask where there is one."""
    return values.mean(-1) if mask is None else torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)


@_in_float32
def attention_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of attention maps [batch, heads, tokens, tokens], times the tokens.

    Different numbers of heads are compared by their mean over heads. The factor undoes that a row sums up to one: its
    entries, and with them the squares, shrink with the length.
    """
    ours, theirs = student.float(), teacher.detach().float()
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = ours.mean(1), theirs.mean(1)
    return functional.mse_loss(ours, theirs) * ours.shape[-1]


@_in_float32
def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between samples; [samples, width] and [samples, teacher width].

    Raises:
        RecipeError: a single sample, or none.
    """
    require_samples("relations", len(student))
    ours = functional.normalize(student.float(), dim=-1)
    theirs = functional.normalize(teacher.detach().float(), dim=-1)
    return functional.mse_loss(ours @ ours.T, theirs @ theirs.T)


@_in_float32
def distance_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the distances of samples, each in units of its own mean; shapes as `similarity_error`.

    Raises:
        RecipeError: fewer than three samples: a single distance is always its own mean.
    """
    require_samples("distances", len(student))
    return functional.smooth_l1_loss(_distances(student.float()), _distances(teacher.detach().float()))


def _distances(samples: Tensor) -> Tensor:
    """Distances of all pairs of [samples, width] over their mean, [pairs]."""
    first, second = torch.triu_indices(len(samples), len(samples), offset=1, device=samples.device)
    # the root has no slope at zero, where two samples are the same
    distances = (samples[first] - samples[second]).square().sum(-1).clamp_min(1e-12).sqrt()
    return distances / distances.mean().clamp_min(1e-12)


def require_samples(name: str, count: int, why: str = "") -> None:
    """Checks how many samples are compared with each other at once.

    Raises:
        RecipeError: too few for the signal `name`; `why` says where the number comes from.
    """
    if count < LEAST_SAMPLES[name]:
        raise RecipeError(
            f"{name} compares samples with each other, and there are {count} at once{why and f': {why}'}; allowed: at "
            f"least {LEAST_SAMPLES[name]}. Give more windows at once, longer ones where they are cut into samples, or "
            f"{name}: 0"
        )


@_in_float32
def sentence_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine between sentence vectors [sentences, width], both."""
    return 1 - functional.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


@_in_float32
def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Means over the words: states [batch, tokens, width], mask bool [batch, tokens] → [batch, width]."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1)


@_in_float32
def value_relations_error(student: Tensor, teacher: Tensor, relation_heads: int, mask: Tensor | None = None) -> Tensor:
    """KL between the relations of value vectors, mean over heads and tokens of each window, then over windows.

    Args:
        student: [batch, tokens, width], all heads' values side by side.
        teacher: [batch, tokens, teacher width].
        relation_heads: how many parts both are cut into (MiniLMv2): widths and heads need not agree, but it must divide
            both widths.
        mask: bool [batch, tokens], which are words; None where all are.
    """
    ours = _relations(student.float(), relation_heads, mask)
    theirs = _relations(teacher.detach().float(), relation_heads, mask)
    rows = None if mask is None else mask.unsqueeze(1).expand(ours.shape[:-1])  # [batch, heads, tokens]
    return _over_words(_kl_by_token(theirs, ours), rows).mean()


def shared_heads(width: int, teacher_width: int) -> int:
    """The most relation heads, up to 12, that divide both widths."""
    return max(n for n in range(1, MOST_RELATION_HEADS + 1) if not width % n and not teacher_width % n)


def _relations(values: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Log softmax(V Vᵀ / √d) of each part, [batch, heads, tokens, tokens]."""
    batch, tokens, width = values.shape
    parts = values.reshape(batch, tokens, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / (width // heads) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return torch.log_softmax(scores, -1)
