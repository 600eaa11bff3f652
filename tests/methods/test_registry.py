"""Methods from plain values: what cannot be is refused in words, what can be comes back equal."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from fettle.errors import RecipeError
from fettle.methods import registry
from fettle.methods.registry import METHODS, from_fields, to_fields
from fettle.methods.statistics import OF_THE_WEIGHT, STATISTICS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_itself(name: str) -> None:
    cls = registry.get(name)
    assert cls.name == name
    assert cls.title and cls.source
    assert cls.objective in ("weight_error", "output_error", "robust_error", "first_order")
    assert set(cls.statistics) <= set(STATISTICS) | OF_THE_WEIGHT


@pytest.mark.parametrize("name", METHODS)
def test_fields_come_back_equal_through_yaml(name: str) -> None:
    for given in ({}, {"bits": 3, "group_size": None, "asymmetric": True, "scale_dtype": "float16"}):
        method = from_fields(name, {key: given[key] for key in given if key in METHODS[name].__dataclass_fields__})
        assert from_fields(name, yaml.safe_load(yaml.safe_dump(to_fields(method)))) == method


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, r"gptq: bits=9 cannot be; allowed: integers from 1 to 8, none.*default, none"),
        ({"bits": True}, "bits=True"),
        ({"bits": "4"}, "bits='4'"),
        ({"bits": 1}, r"bits=1 cannot be; allowed: integers 2 to 8"),
        ({"grid": "binary", "bits": 4}, r"bits=4 cannot be with grid 'binary'; allowed: 1\. Leave bits out for 1"),
        ({"grid": "normal_float", "asymmetric": True}, "a zero point needs the uniform grid"),
        ({"grid": "learned", "scale_dtype": "float8_e8m0fnu"}, "would be no finer than a float8 grid"),
        ({"grid": "nf4"}, "allowed: uniform, float"),
        ({"group_size": 0}, r"group_size=0 cannot be; allowed: integers from 1, none"),
        ({"group_size": 2.5}, "group_size=2.5"),
        ({"group_size": 2**63}, r"allowed: integers from 1 to 9223372036854775807, none"),
        ({"asymmetric": 1}, "asymmetric=1 cannot be; allowed: true, false"),
        ({"scale_dtype": "fp16"}, "allowed: auto, float16, bfloat16, float32"),
        ({"granularity": "rows"}, "allowed: tensor, channel, group, none"),
        ({"granularity": "group", "group_size": None}, "needs a group_size"),
        ({"damping": -0.1}, "damping=-0.1 cannot be; allowed: numbers from 0.0 to 1.0"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"bit": 4}, "did you mean 'bits'"),
        ({"groupsize": 4}, "did you mean 'group_size'"),
    ],
)
def test_impossible_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_fields("gptq", fields)


def test_an_unknown_method_gets_the_nearest_spelling() -> None:
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        registry.get("gtpq")


@pytest.mark.parametrize(
    ("fields", "dtype", "described"),
    [
        ({}, "bfloat16", "int4, group 32, bfloat16 scale"),
        ({"group_size": None}, "float16", "int4, a scale a channel, float16 scale"),
        ({"granularity": "tensor", "asymmetric": True}, "float32", "int4, a scale a tensor, zero point, float32 scale"),
        ({"scale_dtype": "float16", "bits": 2}, "bfloat16", "int2, group 32, float16 scale"),
        ({}, "float64", "int4, group 32, float32 scale"),
        ({"grid": "binary"}, "bfloat16", "binary 1 bits, group 32, bfloat16 scale"),
        ({"grid": "learned", "group_size": None}, "float16", "learned 4 bits, a table a channel, float16 table"),
        (
            {"grid": "float", "group_size": 16, "scale_dtype": "float8_e4m3fn"},
            "bfloat16",
            "float 4 bits, group 16, float8_e4m3fn scale and a tensor scale",
        ),
    ],
)
def test_fields_say_the_scheme(fields: dict[str, Any], dtype: str, described: str) -> None:
    assert from_fields("round_to_nearest", fields).scheme(dtype).describe() == described


def test_methods_for_the_whole_model_declare_themselves_and_are_no_matrix_methods() -> None:
    assert set(registry.BASES) == {"rotation"} and not set(registry.BASES) & set(METHODS)
    cls = registry.BASES["rotation"]
    assert cls.name == "rotation" and cls.title and cls.source and cls.switch == "rotate" and cls.statistics == ()
    method = registry.basis_from_fields("rotation", {"seed": 4, "heads": False})
    assert registry.basis_from_fields("rotation", yaml.safe_load(yaml.safe_dump(to_fields(method)))) == method
    with pytest.raises(RecipeError, match="compresses no linear by itself"):
        from_fields("rotation", {})
