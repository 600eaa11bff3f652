"""The paragraph: every figure in it is one of the diagnosis."""

from __future__ import annotations

from typing import Any

from fettle.diagnose.diagnosis import Depth, Diagnosis, Effect, correlations
from fettle.diagnose.words import deciding_candidate, in_words


def made(kl: dict[str, float], gram: float = 1.0, ratio: float = 2.0) -> Diagnosis:
    """A diagnosis of linears with these KLs for one candidate of four bits, and a hundredth of them for eight."""
    effects = [
        Effect(
            linear=name, candidate=label, bits_per_weight=bits, weight_snr_db=20.0, output_snr_db=25.0,
            kl_estimate=value / share, gram_estimate=gram, kl=value / share,
        )
        for label, bits, share in (("four", 4.5, 1), ("eight", 8.5, 100))
        for name, value in kl.items()
    ]  # fmt: skip
    facts: list[dict[str, Any]] = [
        {"name": name, "block": place, "role": name, "shape": [4, 8], "activations": [{"channel": 7, "ratio": ratio}]}
        for place, name in enumerate(kl)
    ]
    depth = [
        Depth(candidate=label, original_inputs=[0.1], compressed_inputs=[0.1], kl=total, kl_estimate_sum=total)
        for label, total in (("four", 0.5), ("eight", 0.005))
    ]
    return Diagnosis(
        candidates=[], linears=facts, effects=effects, depth=depth,
        correlation=correlations(effects, ["four", "eight"]), measured_linears=len(kl), tokens=10,
    )  # fmt: skip


def test_the_sensitive_linear_is_named_with_its_share_and_its_reason() -> None:
    words = in_words(made({"query": 0.01, "up": 0.02, "output": 0.03, "down": 0.34}, ratio=40.0))
    assert "Keep high: down (85% of the KL; an error of its outputs weighs 13.6 times" in words
    assert "input channel 7 reaches 40 times the median channel" in words
    assert "the role down costs most, 85% of the KL on 25% of the weights" in words
    assert "Lowest risk: query (0.01)" in words
    assert "(measured); together they cost 0.5" in words


def test_words_speak_of_the_candidate_in_the_middle() -> None:
    assert deciding_candidate(made({"a": 1.0})) == "four"


def test_one_linear_and_no_effect_at_all() -> None:
    assert "100% of the KL in 1 of 1 linears" in in_words(made({"down": 0.5}))
    assert "nothing to keep high" in in_words(made({"down": 0.0}))
