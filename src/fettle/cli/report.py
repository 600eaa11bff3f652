"""`fettle report`: one HTML page of any number of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fettle.cli.options import Json
from fettle.cli.output import emit_json
from fettle.errors import UsageError
from fettle.report.atomic import require_writable
from fettle.report.page import read_document, write_report

Results = Annotated[list[Path], typer.Argument(metavar="RESULTS…", help="Folders that compress wrote, or JSON files.")]
Page = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="The page to write.")]


def run(results: Results, output: Page = Path("report.html"), json: Json = False) -> None:
    """Make one self-contained HTML page of results: folders that compress wrote, or what --json printed.

    \b
    Example:
      fettle report small small-3bit evaluation.json -o report.html
    """
    require_writable(output)
    found = [read_result(path) for path in results]
    write_report(output, found)
    if json:
        emit_json("report", {"report": output, "results": len(found)})
    else:
        print(f"Report: {output}")


def read_result(path: Path) -> dict[str, Any]:
    """A result as the page wants it, from a model's folder, its .run folder, or a file of JSON.

    Raises:
        UsageError: nothing there, no JSON, or JSON of something else.
    """
    if not path.is_dir():
        document = read_document(path)
        if document.get("kind") == "evaluation":  # `command` is the verb there; the page wants the whole line
            document["command"] = (document.get("evaluation") or {}).get("command_line", "")
        return document
    places = [path / "summary.json", path.with_name(f"{path.resolve().name}.run") / "summary.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(
            f"{path} holds no result: there is neither {places[0]} nor {places[1]}. Give a folder that compress wrote, "
            "or what `fettle evaluate --json` printed"
        )
    return read_document(found)
