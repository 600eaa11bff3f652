"""The report: result files in, one self-contained HTML page out.

Reads plain data (the summary of a compression, an evaluation), never a model. The page makes no request, runs no
script and
escapes everything that came from a text or a name: a token may well be `</script>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fettle.errors import UsageError
from fettle.report.atomic import write_atomically
from fettle.report.plots import bars, histogram
from fettle.report.tables import comparison, figures, role_errors, verdict

SCHEMA = 1


def write_report(path: str | Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Writes the page of one or several result documents to `path`, whole or not at all."""
    write_atomically(Path(path), render(documents))


def read_document(path: str | Path) -> dict[str, Any]:
    """Reads a result file: what `compress`, `evaluate` or `demo` printed with --json, or OUT.run/summary.json.

    Raises:
        UsageError: no such file, no JSON, or not a result of fettle's.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give result files, such as OUT.run/summary.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no JSON: {error}; give result files, such as OUT.run/summary.json") from error
    document = content.get("summary", content) if isinstance(content, dict) else {}
    if document.get("schema", content.get("schema") if isinstance(content, dict) else None) != SCHEMA or not (
        "evaluation" in document or "perplexity" in document or "model_bits_per_weight" in document
    ):
        raise UsageError(
            f"{path} is no result of fettle's with schema {SCHEMA}; give what compress or evaluate --json printed"
        )
    return (
        document
        if "evaluation" in document
        else {"schema": SCHEMA, "kind": "evaluation", "evaluation": document, **_named(document)}
    )


def _named(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("model", "reference", "command") if key in document}


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page as text."""
    if not documents:
        raise UsageError("a report needs at least one result file")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    views = [_view(document) for document in documents]
    title = views[0]["title"] if len(views) == 1 else f"{len(views)} results"
    return environment.get_template("page.html.j2").render(
        title=title, views=views, comparison=comparison(documents) if len(documents) > 1 else None
    )


def _view(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows of one document; missing pieces are empty."""
    found = document.get("evaluation") or {}
    calibration = document.get("calibration")
    return {
        "title": _title(document),
        "verdict": verdict(document),
        "figures": figures(document),
        "by_block": _block_plot(found),
        "by_role": _role_plot(document),
        "histogram": _histogram_plot(found),
        "worst": [_readable(token) for token in found.get("worst_tokens") or []],
        "completions": document.get("completions") or [],
        "recipe": document.get("recipe_yaml") or "",
        "ledger": document.get("ledger") or [],
        "calibration": calibration,
        "text": {k: found.get(k) or "" for k in ("text_source", "text_sha256", "text_note")} if found else None,
        "hashes": _hashes(document, found),
        "versions": document.get("versions") or found.get("versions") or {},
        "command": document.get("command") or "",
    }


def _readable(token: Mapping[str, Any]) -> dict[str, Any]:
    """A worst token with what the models said in quotes, so that blanks and line ends can be seen."""
    said = {key: json.dumps(token[key], ensure_ascii=False) for key in ("predicted", "reference_predicted")}
    return {**token, **said}


def _title(document: Mapping[str, Any]) -> str:
    model = str(document.get("model") or "model")
    recipe = document.get("recipe")
    return f"{model} · {recipe['name']}" if recipe else model


def _hashes(document: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    base = (document.get("base") or {}).get("hashes") or found.get("reference_hashes") or {}
    output = (document.get("output") or {}).get("hashes") or found.get("model_hashes") or {}
    return [("original", n, h) for n, h in sorted(base.items())] + [
        ("compressed", n, h) for n, h in sorted(output.items())
    ]


def _block_plot(found: Mapping[str, Any]) -> Markup:
    errors = found.get("error_by_block") or []
    if not errors:
        return Markup("")
    values = {str(index): 100 * error for index, error in enumerate(errors)}
    return Markup(
        bars(
            values, title="Error after each block", unit="% of the signal", axis="block",
            description=f"Relative error of the hidden states after each of {len(errors)} blocks, the last {errors[-1]:.2%}.",  # noqa: E501
        )
    )  # fmt: skip


def _role_plot(document: Mapping[str, Any]) -> Markup:
    values = role_errors(document.get("ledger") or [])
    if not values:
        return Markup("")
    return Markup(
        bars(
            values, title="Error by role", unit="% of the energy", axis="role of the linear",
            description="Mean relative squared error of the linears of each role.",
        )
    )  # fmt: skip


def _histogram_plot(found: Mapping[str, Any]) -> Markup:
    data = found.get("kl_histogram") or {}
    if not data:
        return Markup("")
    return Markup(
        histogram(
            data["edges"], data["counts"], title="How the loss is spread over tokens",
            unit="KL to the original, nats a token (logarithmic)",
            description="Histogram of the KL divergence of every measured token.",
        )
    )  # fmt: skip
