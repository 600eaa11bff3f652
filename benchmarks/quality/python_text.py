"""The training text of the embedded model's own domain: the standard library without its held-out modules, as one file.

python benchmarks/quality/python_text.py OUT.txt [CHARACTERS]     (without a name: how long it would be)

The split is by the SHA-256 of a module's name, as in `tools/train_reference.py`: the held-out text that the package
ships to judge by has none of these modules. Their order is shuffled by a seed, so that the end of the file, which a
training holds back, is no one package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[2] / "tools" / "train_reference.py"


def split_rule() -> Any:
    """The tool that made the embedded model, as a module."""
    spec = importlib.util.spec_from_file_location("train_reference", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_text(most: int = 3_000_000) -> str:
    """Training modules of the standard library with a blank line between them: its first `most` characters."""
    rule, texts = split_rule(), []
    for name, path in rule.source_files():
        if name.startswith("python/") and not rule.is_held_out(name):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)[:most]


def main() -> None:
    """Writes the text, or says how long it is."""
    text = python_text(int(sys.argv[2])) if len(sys.argv) > 2 else python_text()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    print(json.dumps({"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}))


if __name__ == "__main__":
    main()
