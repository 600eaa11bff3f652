"""Which linears choose together, what a mix stores, and that its recipe is an ordinary one."""

from __future__ import annotations

import dataclasses

import pytest

from fettle.diagnose.candidates import as_candidates
from fettle.errors import UsageError
from fettle.models.anatomy import Anatomy, Linear, Slot
from fettle.pipeline.recipe import CalibrationOptions, assign, parse_recipe
from fettle.search.budget import Budget, parse_size
from fettle.search.mixes import Problem, as_recipe, grouped
from fettle.search.refine import ESTIMATE_FACTOR, settle

TEXTS = ["gptq bits=2", "gptq bits=4", "round_to_nearest bits=8"]


@pytest.fixture()
def problem(tiny_anatomy: Anatomy) -> Problem:
    linears = list(tiny_anatomy.linears())
    return Problem(
        groups=grouped(tiny_anatomy, linears, "together"),
        candidates=tuple(as_candidates(TEXTS, "bfloat16")),
        storage="pack-quantized",
        limit_bytes=10**9,
    )


def sensitivities(problem: Problem) -> dict[str, dict[str, float]]:
    return {
        linear.name: {"gptq-2bit": 0.4 + place / 100, "gptq-4bit": 0.02, "round_to_nearest-8bit": 1e-4}
        for place, linear in enumerate(linear for group in problem.groups for linear in group)
    }


def test_query_key_value_and_gate_up_choose_together(tiny_anatomy: Anatomy) -> None:
    linears = list(tiny_anatomy.linears())
    roles = [[linear.role for linear in group] for group in grouped(tiny_anatomy, linears, "together")]
    assert roles == 2 * [["query", "key", "value"], ["output"], ["gate", "up"], ["down"]]
    assert all(len(group) == 1 for group in grouped(tiny_anatomy, linears, "free"))


def test_experts_of_a_block_count_as_one(tiny_anatomy: Anatomy) -> None:
    def expert(number: int, part: str, role: str, reads: str) -> Linear:
        name = f"model.layers.0.mlp.experts.{number}.{part}"
        group = f"model.layers.0.mlp.experts.{number}.{reads}"
        return Linear(name, f"{name}.weight", role, 0, (4, 4), Slot("experts"), group, expert=number)

    linears = [
        expert(number, part, role, reads)
        for number in range(3)
        for part, role, reads in (
            ("gate_proj", "expert_gate", "gate_up"), ("up_proj", "expert_up", "gate_up"),
            ("down_proj", "expert_down", "down_proj"),
        )
    ]  # fmt: skip
    assert [len(group) for group in grouped(tiny_anatomy, linears, "together")] == [6, 3]


def test_the_best_mix_fits_and_spends_what_it_may(problem: Problem) -> None:
    costs = sensitivities(problem)
    everything = problem.best_mix(costs)
    assert everything is not None and set(everything.values()) == {"round_to_nearest-8bit"}
    tight = dataclasses.replace(problem, limit_bytes=(problem.smallest_bytes() + problem.stored_bytes(everything)) // 2)
    mix = tight.best_mix(costs)
    assert mix is not None and len(set(mix.values())) > 1
    assert tight.stored_bytes(mix) <= tight.limit_bytes
    assert dataclasses.replace(problem, limit_bytes=problem.smallest_bytes() - 1).best_mix(costs) is None


def test_the_recipe_of_a_mix_says_the_mix(problem: Problem, tiny_anatomy: Anatomy) -> None:
    labels = [candidate.label for candidate in problem.candidates]
    mix = {linear.name: labels[place % 3] for place, linear in enumerate(tiny_anatomy.linears())}
    recipe = as_recipe(mix, problem.candidates, "3bit", CalibrationOptions())
    assert parse_recipe(recipe.to_dict(), "test") == recipe
    methods = {candidate.label: candidate.method for candidate in problem.candidates}
    assert assign(recipe, tiny_anatomy) == {name: methods[label] for name, label in mix.items()}


def test_right_estimates_are_left_alone(problem: Problem) -> None:
    costs = sensitivities(problem)
    best, rounds = settle(problem, costs, lambda mix: sum(costs[name][label] for name, label in mix.items()))
    assert [found.name for found in rounds] == ["round 0"]  # which is the uniform one that fits best
    assert best.predicted_kl == best.measured_kl


def test_wrong_estimates_are_rescaled_and_the_best_measured_wins(problem: Problem) -> None:
    """The estimates take 4 bits for ten times worse than they are; measuring says so."""
    costs = sensitivities(problem)
    wrong = {name: {**by, "gptq-4bit": 0.39} for name, by in costs.items()}
    tight = dataclasses.replace(problem, limit_bytes=problem.smallest_bytes() * 2)
    true = lambda mix: sum(costs[name][label] for name, label in mix.items())  # noqa: E731
    best, rounds = settle(tight, wrong, true)
    assert best.measured_kl == min(found.measured_kl for found in rounds)
    right = tight.best_mix(costs)
    assert right is not None
    assert best.measured_kl <= true(next(iter(tight.uniform_mixes().values())))
    assert rounds[0].measured_kl > true(right) * ESTIMATE_FACTOR  # the estimates alone went wrong
    assert best.measured_kl == pytest.approx(true(right))


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("750mb", 750 * 10**6), ("123", 123)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 parsecs", "-1GB", "1,5GB"])
def test_sizes_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="such as 2GB"):
        parse_size(text)


@pytest.mark.parametrize(
    "budget",
    [Budget(), Budget(bits_per_weight=3, size_bytes=5), Budget(bits_per_weight=0), Budget(bits_per_weight=float("nan")),
     Budget(size_bytes=-1), Budget(bits_per_weight=3, fused="loose")],  # type: ignore[arg-type]
)  # fmt: skip
def test_budgets_that_cannot_be(budget: Budget) -> None:
    with pytest.raises(UsageError):
        budget.validate()
