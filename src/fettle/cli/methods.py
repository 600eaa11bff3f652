"""`fettle methods`: the methods that there are, their sources and their fields."""

from __future__ import annotations

from typing import Annotated

import typer

from fettle.cli.method_pages import describe_methods, describe_training
from fettle.cli.options import Json
from fettle.cli.output import console, emit_json, show, table
from fettle.errors import UsageError, unknown_word

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this method.")]


def run(name: Name = None, json: Json = False) -> None:
    """List the methods and their fields: the keys of a recipe's step or a chain's stage, and flags of compress and
    plan, or of train.

    \b
    Example:
      fettle methods gptq
    """
    described, training = describe_methods(), describe_training()
    if name is not None:
        known = [method["name"] for method in (*described, *training)]
        if name not in known:
            raise UsageError(unknown_word("method", name, known))
        described = [method for method in described if method["name"] == name]
        training = [method for method in training if method["name"] == name]
    if json:
        emit_json("methods", {"methods": described, "training": training})
        return
    out = console()
    for method in (*described, *training):
        out.print(f"{method['name']}: {method['title']}", style="bold")
        out.print(f"  source: {method['source']}")
        if "objective" in method:
            needs = ", ".join(method["statistics"]) or "nothing but weights"
            out.print(f"  minimizes: {method['objective']}; needs: {needs}")
        else:
            out.print("  trains (fettle train)")
        rows = [(f["name"], f["type"], f["default"], f["help"]) for f in method["fields"]]
        show(out, table("", ("field", "type", "default", "what"), rows))
