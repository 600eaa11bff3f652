"""The report: result files in, one self-contained HTML page out.

Reads plain data (the summary of a compression, an evaluation), never a model. The page makes no request, runs no
script
and escapes everything that came from a text or a name: a token may well be `</script>`. Pieces that a document does not
have (no reference, no ledger) leave no trace on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from markupsafe import Markup

from fettle.errors import UsageError
from fettle.report.atomic import write_atomically
from fettle.report.curves import curve_plots
from fettle.report.plots import bars, histogram, lines, rows
from fettle.report.tables import NONE, comparison, figures, kl_shares, names, role_errors, verdict, warning
from fettle.report.templates import compiled

SCHEMA = 1
WORST_SHOWN = 12
CONTEXT_LINES, CONTEXT_LETTERS, FOLLOWING_LETTERS = 3, 180, 60


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
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}; give result files, such as OUT.run/summary.json") from error
    outer = content if isinstance(content, dict) else {}
    document = outer.get("summary", outer)
    if (
        not isinstance(document, dict)
        or document.get("schema", outer.get("schema")) != SCHEMA
        or not isinstance(document.get("evaluation"), dict | None)
        or not ("evaluation" in document or "perplexity" in document or "model_bits_per_weight" in document)
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
    """The page as text: one document whole, or several side by side and then one by one.

    Raises:
        UsageError: no document, or one that lacks what every result has.
    """
    if not documents:
        raise UsageError("a report needs at least one result file")
    try:
        views = [_view(document) for document in documents]
        title = views[0]["title"] if len(views) == 1 else f"{len(views)} results side by side"
        return compiled("page.html.j2").render(
            title=title, views=views, comparison=_comparison(documents) if len(documents) > 1 else None
        )
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RecursionError,
        TemplateError,
    ) as error:
        raise UsageError(
            f"a result file is not whole ({type(error).__name__}: {error}); write it again with compress or "
            "evaluate --json"
        ) from error


def _view(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template shows of one document; missing pieces are empty."""
    found = document.get("evaluation") or {}
    table = figures(document)
    return {
        "title": _title(document),
        "verdict": verdict(document),
        "warning": warning(document),
        "figures": table,
        "has_original": any(before != NONE for lines in table.values() for _, before, _ in lines),
        "after": {"compression": "compressed", "training": "trained"}.get(str(document.get("kind")), "measured"),
        "curves": curve_plots(document.get("stages") or []),
        "by_block": _block_plot(found),
        "by_role": _role_plot(document),
        "histogram": _histogram_plot(found),
        "shares": kl_shares(found.get("kl_histogram") or {}),
        "worst": [_readable(token) for token in (found.get("worst_tokens") or [])[:WORST_SHOWN]],
        "completions": document.get("completions") or [],
        "recipe": document.get("recipe_yaml") or "",
        "ledger": document.get("ledger") or [],
        "calibration": document.get("calibration"),
        "text": {k: found.get(k) or "" for k in ("text_source", "text_sha256", "text_note")} if found else None,
        "hashes": _hashes(document, found),
        "versions": document.get("versions") or found.get("versions") or {},
        "command": document.get("command") or "",
    }


def _readable(token: Mapping[str, Any]) -> dict[str, Any]:
    """A worst token with its nearest context, and blanks and line ends that can be seen."""
    shown = {key: visible(str(token[key])) for key in ("token", "predicted", "reference_predicted")}
    probabilities = [f"{100 * token[key]:.3g}%" for key in ("reference_probability", "probability") if key in token]
    return {
        "kl": token["kl"],
        "context": nearest(str(token.get("context") or "")),
        "following": ("\n" if "\n" in str(token["token"]) else "")
        + _first_paragraph(str(token.get("following") or "")),
        "probabilities": " → ".join(probabilities),
        **shown,
    }


def _first_paragraph(text: str) -> str:
    return text.rstrip().split("\n\n")[0][:FOLLOWING_LETTERS]


def visible(token: str) -> str:
    """The token with line ends, tabs and outer blanks as signs; the blanks inside of words stay.

    >>> visible(" str"), visible("\\n    ")
    ('·str', '↵····')
    """
    signs = token.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")
    inner = signs.strip(" ")
    before = len(signs) - len(signs.lstrip(" "))
    return "·" * before + inner + "·" * (len(signs) - before - len(inner)) if inner else "·" * len(signs)


def nearest(context: str) -> str:
    """The last lines before a token: few, and without the empty ones in front."""
    lines = [line for line in context.split("\n")[:-1] if line.strip()][1 - CONTEXT_LINES :]
    text = "\n".join([*lines, context.rpartition("\n")[2]])
    return text if len(text) <= CONTEXT_LETTERS else "…" + text[-CONTEXT_LETTERS:]


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
    return Markup(
        bars(
            [100 * error for error in errors], title="Error after each block", unit="% of the signal", axis="block",
            description=f"Relative error of the hidden states after each of {len(errors)} blocks; "
            f"{errors[0]:.2%} after the first, {errors[-1]:.2%} after the last.",
        )
    )  # fmt: skip


def _role_plot(document: Mapping[str, Any]) -> Markup:
    values = role_errors(document.get("ledger") or [])
    if not values:
        return Markup("")
    return Markup(
        rows(
            values, title="Error by role", unit="% of the energy",
            description="Mean relative squared error of the linears of each role: "
            + ", ".join(f"{role} {value:.3g}%" for role, value in values.items()),
        )
    )  # fmt: skip


def _histogram_plot(found: Mapping[str, Any]) -> Markup:
    data = found.get("kl_histogram") or {}
    if not data:
        return Markup("")
    return Markup(
        histogram(
            data["edges"], data["counts"], title="How the loss is spread over tokens",
            unit="KL to the original, nats a token",
            description="Histogram of the KL divergence of every measured token; the table beside it says the same.",
        )
    )  # fmt: skip


def _comparison(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of several documents, and what can be drawn of all of them in one plot."""
    named = dict(zip(names(documents), [document.get("evaluation") or {} for document in documents], strict=True))
    errors = {name: [100 * error for error in found.get("error_by_block") or []] for name, found in named.items()}
    errors = {name: values for name, values in errors.items() if values}
    kl = {name: found["kl_mean"] for name, found in named.items() if found.get("kl_mean") is not None}
    return {
        **comparison(documents),
        "kl": Markup(
            rows(kl, title="Mean KL to the original", unit="nats a token", description=f"Of {len(kl)} results.")
        ),
        "by_block": Markup(
            lines(
                errors, title="Error after each block", unit="% of the signal", axis="block",
                description=f"Relative error of the hidden states after each block, {len(errors)} results.",
            ) if errors else ""
        ),
    }  # fmt: skip
