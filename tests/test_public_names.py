"""What `import fettle` offers, and that the names stay what they are whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fettle


@pytest.mark.parametrize(
    "name", ["compress", "diagnose", "evaluate", "generate", "inspect", "load", "open_engine", "plan", "train"]
)
def test_every_call_is_a_documented_function(name: str) -> None:
    call = getattr(fettle, name)
    assert callable(call)
    assert call.__doc__


def test_importing_fettle_imports_nothing_heavy() -> None:
    code = (
        "import sys, fettle; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("first", ["import fettle.evaluate.result", "import fettle.api", "fettle.compress", "pass"])
def test_evaluate_is_the_call_although_a_room_has_its_name(first: str) -> None:
    check = "assert callable(fettle.evaluate)\nfrom fettle import evaluate\nassert callable(evaluate)"
    code = f"import fettle\n{first}\n{check}"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = fettle.compres  # type: ignore[attr-defined]
