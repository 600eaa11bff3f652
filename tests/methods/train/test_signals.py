"""Every signal and its gradient against the formula written out, entry by entry, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fettle.errors import RecipeError
from fettle.methods.train import signals

TOKENS, VOCAB, WIDTH = 5, 7, 6


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: Tensor) -> list[Tensor]:
    whole = sum(torch.exp(entry) for entry in row)
    return [torch.exp(entry) / whole for entry in row]


def kl(first: list[Tensor], second: list[Tensor]) -> Tensor:
    return torch.stack([p * torch.log(p / q) for p, q in zip(first, second, strict=True)]).sum()


def plain_divergence(student: Tensor, teacher: Tensor, temperature: float, name: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student, teacher, strict=True):
        q, p = softmax(ours / temperature), softmax(theirs / temperature)
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        total = (
            total
            + {"forward": lambda p=p, q=q: kl(p, q), "reverse": lambda p=p, q=q: kl(q, p)}.get(
                name, lambda p=p, q=q, middle=middle: (kl(p, middle) + kl(q, middle)) / 2
            )()
        )
    return temperature**2 * total / len(student)


def plain_logits(student: Tensor, teacher: Tensor) -> Tensor:
    parts = []
    for ours, theirs in zip(student, teacher, strict=True):
        for i in range(len(ours)):
            parts.append(((ours[i] - ours.mean()) - (theirs[i] - theirs.mean())) ** 2)
    return torch.stack(parts).mean()


def plain_features(student: Tensor, teacher: Tensor) -> Tensor:
    squares = [(a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)]
    return torch.stack(squares).mean() / torch.stack([b**2 for b in teacher.flatten()]).mean()


def plain_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    def cosine(rows: Tensor, i: int, j: int) -> Tensor:
        return (rows[i] * rows[j]).sum() / (rows[i].norm() * rows[j].norm())

    n = len(student)
    return torch.stack(
        [(cosine(student, i, j) - cosine(teacher, i, j)) ** 2 for i in range(n) for j in range(n)]
    ).mean()


def plain_distance(student: Tensor, teacher: Tensor) -> Tensor:
    def distances(rows: Tensor) -> Tensor:
        found = torch.stack([(rows[i] - rows[j]).norm() for i in range(len(rows)) for j in range(i + 1, len(rows))])
        return found / found.mean()

    gaps = distances(student) - distances(teacher)
    return torch.stack([g**2 / 2 if abs(float(g.detach())) < 1 else abs(g) - 0.5 for g in gaps]).mean()


def plain_values(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    def rows(values: Tensor, head: int) -> list[list[Tensor]]:
        size = values.shape[-1] // heads
        part = values[:, head * size : (head + 1) * size]
        return [softmax(torch.stack([(a * b).sum() / math.sqrt(size) for b in part])) for a in part]

    found = [
        kl(p, q) for h in range(heads) for p, q in zip(rows(teacher, h), rows(student, h), strict=True)
    ]  # fmt: skip
    return torch.stack(found).mean()


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    **{
        f"soft {name} T={t}": (
            lambda s, t_, name=name, t=t: signals.soft_labels(s, t_, t, name),
            lambda s, t_, name=name, t=t: plain_divergence(s, t_, t, name),
        )
        for name in ("forward", "reverse", "jensen_shannon")
        for t in (1.0, 2.5)
    },
    "logits": (signals.logits_error, plain_logits),
    "features": (signals.features_error, plain_features),
    "relations": (signals.similarity_error, plain_similarity),
    "distances": (signals.distance_error, plain_distance),
    "values": (
        lambda s, t: signals.value_relations_error(s.unsqueeze(0), t.unsqueeze(0), 2),
        lambda s, t: plain_values(s, t, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_signal_and_its_gradient_are_those_of_its_formula(name: str) -> None:
    ours, written_out = CASES[name]
    student, teacher = drawn(1, TOKENS, WIDTH).requires_grad_(), drawn(2, TOKENS, WIDTH).requires_grad_()
    exact, target = student.detach().double().requires_grad_(), teacher.detach().double()
    found, expected = ours(student, teacher), written_out(exact, target)
    found.backward()
    expected.backward()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert float(exact.grad.abs().max()) > 1e-4  # a formula without a slope would show nothing
    assert teacher.grad is None


@pytest.mark.parametrize("name", CASES)
def test_a_signal_is_nothing_for_equal_models(name: str) -> None:
    same = drawn(3, TOKENS, WIDTH)
    assert float(CASES[name][0](same.clone(), same)) == pytest.approx(0, abs=1e-6)


def test_cross_entropy_is_the_mean_of_minus_log_probability() -> None:
    logits, labels = drawn(4, TOKENS, VOCAB), torch.tensor([0, 6, 2, 2, 5])
    expected = -sum(torch.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)) / TOKENS
    assert float(signals.cross_entropy(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_a_projection_learns_where_widths_differ() -> None:
    student, teacher = drawn(5, TOKENS, 4), drawn(6, TOKENS, 6)
    projection = drawn(7, 6, 4).requires_grad_()
    signals.features_error(student, teacher, projection).backward()
    difference = student @ projection.detach().T - teacher
    expected = 2 * difference.T @ student / difference.numel() / teacher.square().mean()
    assert torch.allclose(projection.grad, expected, rtol=1e-4, atol=1e-6)


def test_attention_maps_with_other_numbers_of_heads_are_compared_by_their_mean() -> None:
    student, teacher = drawn(8, 1, 2, 3, 3).softmax(-1), drawn(9, 1, 4, 3, 3).softmax(-1)
    expected = (student.mean(1) - teacher.mean(1)).square().mean() * 3
    assert float(signals.attention_error(student, teacher)) == pytest.approx(float(expected), rel=1e-6)
    same = drawn(10, 1, 2, 3, 3).softmax(-1)
    assert float(signals.attention_error(student, same)) == pytest.approx(float((student - same).square().mean() * 3))


def test_features_are_means_over_windows_of_their_words() -> None:
    """Each window over its own mean square; what is padding is nothing."""
    student, teacher = drawn(20, 2, TOKENS, WIDTH), drawn(21, 2, TOKENS, WIDTH) * torch.tensor([1.0, 5.0]).view(2, 1, 1)
    mask = torch.tensor([[True] * TOKENS, [True, True, False, False, False]])
    parts = [plain_features(student[0], teacher[0]), plain_features(student[1, :2], teacher[1, :2])]
    found = signals.features_error(student, teacher, mask=mask)
    assert float(found) == pytest.approx(float(sum(parts) / 2), rel=1e-5)


def test_equal_samples_have_a_gradient() -> None:
    student = drawn(22, TOKENS, WIDTH)
    student[1] = student[0]
    student.requires_grad_()
    found = signals.distance_error(student, drawn(23, TOKENS, WIDTH))
    found.backward()
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.abs().max()) > 0


@pytest.mark.parametrize(("name", "count"), [("relations", 0), ("relations", 1), ("distances", 1), ("distances", 2)])
def test_too_few_samples_are_refused(name: str, count: int) -> None:
    signal = {"relations": signals.similarity_error, "distances": signals.distance_error}[name]
    with pytest.raises(RecipeError, match=rf"{name} compares samples.*there are {count} at once; allowed: at least"):
        signal(drawn(24, count, WIDTH), drawn(25, count, WIDTH))


@pytest.mark.parametrize("name", [*CASES, "projected", "pooled", "sentences"])
def test_signals_are_in_float32_inside_autocast(name: str) -> None:
    projection = drawn(26, WIDTH, WIDTH)
    others: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "projected": lambda s, t: signals.features_error(s, t, projection),
        "pooled": lambda s, t: signals.pooled(s.unsqueeze(0), torch.ones(1, TOKENS, dtype=torch.bool)),
        "sentences": signals.sentence_error,
    }
    signal = others[name] if name in others else CASES[name][0]
    student, teacher = drawn(27, TOKENS, WIDTH), drawn(28, TOKENS, WIDTH)
    expected = signal(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = signal(student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def kept(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logs = torch.log_softmax(teacher / temperature, -1)
    top, indices = logs.topk(k, -1)
    return indices, top, logs.scatter(-1, indices, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kept_labels_with_everything_kept_are_soft_labels(divergence: str, temperature: float) -> None:
    student, teacher = drawn(11, TOKENS, VOCAB), drawn(12, TOKENS, VOCAB)
    whole = signals.soft_labels(student, teacher, temperature, divergence)
    found = signals.kept_labels(student, *kept(teacher, VOCAB, temperature), temperature, divergence)
    assert float(found) == pytest.approx(float(whole), rel=1e-5)


def test_fewer_kept_labels_are_a_lower_bound_that_grows_with_k() -> None:
    student, teacher = drawn(13, TOKENS, VOCAB), drawn(14, TOKENS, VOCAB)
    found = [float(signals.kept_labels(student, *kept(teacher, k, 1.0), 1.0, "forward")) for k in range(1, VOCAB + 1)]
    assert found == sorted(found)
    assert found[0] < found[-1]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_some_kept_labels_at_a_temperature_are_the_merged_distributions(divergence: str) -> None:
    student, teacher, k, temperature = drawn(17, TOKENS, VOCAB), drawn(18, TOKENS, VOCAB), 3, 2.5
    indices, top, rest = kept(teacher, k, temperature)
    merged = []
    for logits in (student, teacher):
        rows = [[p for p in softmax(row / temperature)] for row in logits.double()]
        merged.append(torch.stack([
            torch.stack([*(row[int(i)] for i in chosen),
                         sum(p for i, p in enumerate(row) if i not in chosen.tolist())])  # type: ignore[list-item]
            for row, chosen in zip(rows, indices, strict=True)
        ]).log())  # fmt: skip
    expected = temperature**2 * plain_divergence(merged[0], merged[1], 1.0, divergence)
    found = signals.kept_labels(student, indices, top, rest, temperature, divergence)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_of_kept_labels_is_that_of_the_merged_distribution() -> None:
    student, teacher = drawn(15, 1, VOCAB).requires_grad_(), drawn(16, 1, VOCAB)
    indices, top, rest = kept(teacher, 3, 1.0)
    signals.kept_labels(student, indices, top, rest, 1.0, "forward").backward()
    q = torch.softmax(student.detach()[0], -1)
    others = [i for i in range(VOCAB) if i not in indices[0].tolist()]
    expected = q.clone()
    expected[indices[0]] -= top[0].exp()  # ∂ cross entropy / ∂ logit, of an entry that stands alone
    expected[others] -= rest.exp() * q[others] / q[others].sum()  # and of those that share one
    assert torch.allclose(student.grad[0], expected, atol=1e-6)
