"""summary.json: everything that a compression did and cost, as plain data; written last, read when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fettle.errors import ResumeError, UsageError
from fettle.evaluate.result import Evaluation
from fettle.pipeline.journal import Journal
from fettle.pipeline.run import Run, calibration_summary, versions

#: key → what it must be for the verbs that go on from it
_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": str, "base": dict, "output": dict, "recipe": dict, "recipe_yaml": str, "ledger": list, "versions": dict,
    "completions": list, "seconds": (int, float), "peak_memory_bytes": int, "evaluation": (dict, type(None)),
}  # fmt: skip


def summarize(run: Run, output: Path, journal: Journal) -> dict[str, Any]:
    """What a written model is and was made from; not measured yet, and without what the whole run cost."""
    records = journal.records(output)
    base_bytes = sum((run.checkpoint.folder / shard).stat().st_size for shard in run.checkpoint.shards)
    return {
        "schema": 1,
        "kind": "compression",
        "model": run.model,
        "base": {"name": run.model, "bytes": base_bytes, "hashes": run.identity["model"]},
        "output": {
            "folder": str(output),
            "bytes": sum(record.bytes for record in records),
            "hashes": {record.shard: record.sha256 for record in records},
        },
        "recipe": run.recipe.to_dict(),
        "recipe_yaml": run.recipe.to_yaml(),
        "asked": run.asked,
        "reshaped": list(run.reshaped),
        "calibration": calibration_summary(run),
        "ledger": [line for record in records for line in record.ledger],
        "versions": versions(),
        "evaluation": None,
        "completions": [],
    }


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        ResumeError: the file is damaged; names it and the way out.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = sorted(key for key, kind in _KINDS.items() if not isinstance(found[key], kind))
        if wrong:
            raise TypeError(f"{', '.join(wrong)} cannot be")
        sizes = [int(found[side]["bytes"]) for side in ("base", "output")]
        texts = [pair[key] for pair in found["completions"] for key in ("prompt", "original", "compressed")]
        if min(sizes) < 1 or not all(isinstance(text, str) for text in texts):
            raise TypeError("sizes or completions cannot be")
        if found["evaluation"] is not None:
            Evaluation.from_json(found["evaluation"])
    except (ValueError, TypeError, LookupError, RecursionError, UsageError) as error:
        raise ResumeError(
            f"{path} is damaged ({type(error).__name__}: {error}); give --fresh to start over, or another output folder"
        ) from error
    return dict(found)
