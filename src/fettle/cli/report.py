"""`fettle report`: one HTML page of any number of results."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from fettle.cli.options import Json
from fettle.cli.output import emit_json
from fettle.errors import UsageError
from fettle.report.page import write_report

Results = Annotated[list[Path], typer.Argument(metavar="RESULTS…", help="Folders that compress wrote, or JSON files.")]
Page = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="The page to write.")]


def run(results: Results, output: Page = Path("report.html"), json: Json = False) -> None:
    """Make one self-contained HTML page of results: folders that compress wrote, or what --json printed.

    \b
    Example:
      fettle report small small-3bit evaluation.json -o report.html
    """
    found = [read_result(path) for path in results]
    write_report(output, found)
    if json:
        emit_json("report", {"report": output, "results": len(found)})
    else:
        print(f"Report: {output}")


def read_result(path: Path) -> dict[str, Any]:
    """A result as the page wants it, from a model's folder, a summary.json, or the JSON that a verb printed.

    Raises:
        UsageError: nothing there, no JSON, or JSON of something else.
    """
    source = path
    if path.is_dir():
        source = next((p for p in (path.with_name(path.name + ".run"), path) if (p / "summary.json").is_file()), path)
        source = source / "summary.json"
    if not source.is_file():
        raise UsageError(
            f"{path} holds no result: {source} does not exist; give a folder that compress wrote, or a JSON file"
        )
    try:
        content = json_module.loads(source.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json_module.JSONDecodeError) as error:
        raise UsageError(f"{source} is no JSON: {error}") from None
    if isinstance(content, dict):
        if content.get("kind") in ("compression", "evaluation"):
            return content
        if content.get("command") == "compress" and "summary" in content:
            return dict(content["summary"])
        if content.get("command") == "evaluate":
            return {
                "schema": 1,
                "kind": "evaluation",
                "model": content.get("model"),
                "reference": content.get("reference"),
                "evaluation": content,
            }
    raise UsageError(f"{source} is no result of fettle; give what `fettle compress` or `fettle evaluate --json` wrote")
