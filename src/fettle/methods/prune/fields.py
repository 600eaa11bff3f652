"""The fields that every pruning method shares, and the scheme that they say."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from fettle.errors import RecipeError
from fettle.methods.prune.schedule import ScheduleName
from fettle.methods.quantize.fields import GridFields
from fettle.tensors.levels import GridName
from fettle.tensors.masked import MaskedScheme
from fettle.tensors.patterns import parse_pattern
from fettle.tensors.scheme import SCALE_DTYPES, Granularity, Scheme

USUAL_SPARSITY = 0.5
PATTERN_HELP = (
    "what is compared: layer or row; N:M, of every M inputs N stay (2:4); RxC, blocks of rows x columns (4x4)"
)
Healing = Literal["none", "least_squares"]
OF_CODES = ("group_size", "granularity", "asymmetric", "scale_dtype", "clip")


@dataclass(frozen=True, kw_only=True)
class PruneFields:
    """Recipe keys of a mask, and of the codes of what stays."""

    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "share of a linear's weights that go; none for 0.5, or what the pattern N:M says",
            "minimum": 0.0,
            "maximum": 0.999,
        },
    )
    pattern: str = field(
        default="layer",
        metadata={"help": PATTERN_HELP},
    )
    rounds: int = field(
        default=1, metadata={"help": "prune in so many rounds, each healed; 1 is one shot", "minimum": 1, "maximum": 64}
    )
    schedule: ScheduleName = field(
        default="cubic", metadata={"help": "how the sparsity grows from round to round; cubic prunes most at first"}
    )
    heal: Healing = field(
        default="none",
        metadata={"help": "move what stays so that the outputs change least, under the gram of the inputs"},
    )
    bits: int | None = field(
        default=None,
        metadata={"help": "bits a code of what stays; none keeps values as they are", "minimum": 1, "maximum": 8},
    )
    grid: GridName = field(default="uniform", metadata={"help": "what a code can stand for"})
    group_size: int | None = field(
        default=32, metadata={"help": "columns that share a scale; none for one scale a row", "minimum": 1}
    )
    granularity: Granularity | None = field(
        default=None,
        metadata={"help": "what shares a scale; none lets group_size say it, channel and tensor overrule it"},
    )
    asymmetric: bool = field(default=False, metadata={"help": "store a zero point with each scale"})
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu"] = field(
        default="auto", metadata={"help": "type of the scales"}
    )

    def needs_gram(self) -> tuple[str, ...]:
        """What healing wants to know of the inputs."""
        return ("gram",) if self.heal == "least_squares" else ()

    def validate(self) -> None:
        """Checks that the fields fit together.

        Raises:
            RecipeError: an unknown pattern, a sparsity that contradicts it, codes that cannot be, what is about codes
                without any, or rounds without healing.
        """
        coded = self.scheme("float32").values is not None
        for found in fields(self):
            if not coded and found.name in OF_CODES and getattr(self, found.name) != found.default:
                raise RecipeError(
                    f"{found.name} is about codes, and what stays keeps its values; set bits, such as bits: 4, or "
                    "leave it out"
                )
        usual = next(found.default for found in fields(self) if found.name == "rounds")
        if self.heal == "none" and self.rounds not in (1, usual):
            raise RecipeError(
                f"rounds={self.rounds} without healing prune what one round prunes; set heal: least_squares, or "
                "rounds: 1"
            )

    def scheme(self, dtype: str) -> MaskedScheme:
        """The scheme; `dtype` is the model's own, for values and for scale_dtype "auto"."""
        fixed = parse_pattern(self.pattern).fixed_sparsity
        chosen = self.sparsity if self.sparsity is not None else USUAL_SPARSITY if fixed is None else fixed
        scheme = MaskedScheme(
            pattern=self.pattern,
            sparsity=float(chosen),
            values=self._codes(dtype),
            value_dtype=dtype if dtype in SCALE_DTYPES else "float32",
        )
        scheme.validate()
        return scheme

    def _codes(self, dtype: str) -> Scheme | None:
        if self.bits is None and self.grid == "uniform":
            return None
        codes = GridFields(
            bits=self.bits,
            grid=self.grid,
            group_size=self.group_size,
            granularity=self.granularity,
            asymmetric=self.asymmetric,
            scale_dtype=self.scale_dtype,
        )
        codes.validate()
        return codes.scheme(dtype)
