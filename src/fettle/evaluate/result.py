"""Results: named numbers that say their unit, whether they were measured, and how; and the evaluation of one model.

`Evaluation` is what `fettle evaluate --json` prints, with keys that stay: a later version adds keys, it does not
change what these mean (`schema` counts changes that break that promise).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fettle.errors import QualityGateError, UsageError

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number, and where it comes from."""

    name: str
    value: float
    unit: str
    measured: bool  # else estimated
    how: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured on the files of one model; fields without a reference, or of another kind of model, are
    None.
    """

    perplexity: float | None = field(default=None, metadata={"unit": "", "how": "exp of the mean loss a token"})
    perplexity_standard_error: float | None = field(
        default=None, metadata={"unit": "", "how": "perplexity times the standard error of the mean loss"}
    )
    reference_perplexity: float | None = field(default=None, metadata={"unit": "", "how": "the original's"})
    reference_perplexity_standard_error: float | None = field(
        default=None, metadata={"unit": "", "how": "the original's"}
    )
    bits_per_byte: float | None = field(
        default=None, metadata={"unit": "bits", "how": "summed loss over the text's bytes"}
    )
    reference_bits_per_byte: float | None = field(default=None, metadata={"unit": "bits", "how": "the original's"})
    kl_mean: float | None = field(default=None, metadata={"unit": "nats a token", "how": "KL(original || model)"})
    kl_median: float | None = field(default=None, metadata={"unit": "nats a token", "how": "KL(original || model)"})
    kl_p99: float | None = field(default=None, metadata={"unit": "nats a token", "how": "KL(original || model)"})
    kl_max: float | None = field(default=None, metadata={"unit": "nats a token", "how": "KL(original || model)"})
    top1_agreement: float | None = field(
        default=None, metadata={"unit": "", "how": "share of tokens with the same first choice"}
    )
    probability_rms_change: float | None = field(
        default=None, metadata={"unit": "", "how": "root mean square change of the right token's probability"}
    )
    output_relative_error: float | None = field(
        default=None, metadata={"unit": "", "how": "last block, ‖h - h_ref‖ / ‖h_ref‖"}
    )
    output_cosine: float | None = field(
        default=None, metadata={"unit": "", "how": "mean cosine of a token's last hidden states"}
    )
    bits_per_weight: float | None = field(
        default=None, metadata={"unit": "bits", "how": "everything stored of compressed linears"}
    )
    model_bits_per_weight: float = field(metadata={"unit": "bits", "how": "all tensors' bytes over all parameters"})
    reference_model_bits_per_weight: float | None = field(
        default=None, metadata={"unit": "bits", "how": "the original's"}
    )
    bytes: int = field(metadata={"unit": "bytes", "how": "length of the weights' files"})
    reference_bytes: int | None = field(default=None, metadata={"unit": "bytes", "how": "the original's"})
    parameters: int
    tokens: int
    text_source: str
    text_sha256: str
    text_note: str = ""
    window_tokens: int = 0
    model_hashes: dict[str, str] = field(default_factory=dict)
    reference_hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    worst_tokens: list[dict[str, Any]] = field(default_factory=list)
    kl_histogram: dict[str, list[float]] = field(default_factory=dict)
    error_by_block: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """Reads `to_json`'s result; keys of later versions are passed over.

        Raises:
            UsageError: another schema, or keys that are missing.
        """
        if content.get("schema") != SCHEMA:
            raise UsageError(f"the evaluation has schema {content.get('schema')!r}; this fettle reads {SCHEMA}")
        names = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in content.items() if key in names})
        except TypeError as error:
            raise UsageError(f"the evaluation is not whole: {error}") from error

    def results(self) -> list[Result]:
        """The numbers, one by one, with their units; all of them measured."""
        found = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if "how" in item.metadata and value is not None:
                found.append(
                    Result(
                        name=item.name, value=value, unit=item.metadata["unit"], measured=True, how=item.metadata["how"]
                    )
                )
        return found


class Diverging(Protocol):
    """A measurement of any kind of model against its original."""

    @property
    def kl_mean(self) -> float | None:
        """Nats; None without an original."""
        ...


def check_gate(
    evaluation: Diverging,
    max_kl: float,
    *,
    unit: str = "a token",
    advice: str = "use more bits, smaller groups or gptq, or allow more",
) -> None:
    """Raises QualityGateError when the mean KL is above `max_kl` nats, or could not be measured."""
    if evaluation.kl_mean is None:
        raise UsageError("--max-kl needs a KL, and a KL needs --reference with a language model")
    if not evaluation.kl_mean <= max_kl:
        raise QualityGateError(
            f"the mean KL is {evaluation.kl_mean:.6g} nats {unit}, above the allowed {max_kl:.6g}; {advice}"
        )
