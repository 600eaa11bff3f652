"""A page from a template of this folder and a document: escaped, and one sentence where the document is not whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, UndefinedError

from fettle.errors import UsageError


@functools.cache
def compiled(template: str) -> Template:
    """A template of this folder, compiled once a process: that takes longer than compressing a tiny model."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template)


def render(
    template: str, view: Callable[[Mapping[str, Any]], Mapping[str, Any]], document: Mapping[str, Any], remedy: str
) -> str:
    """`template` with `view(document)`.

    Raises:
        UsageError: the document lacks what the page shows. `remedy` names the document, and says how to get a whole
            one: "the diagnosis; make it again with ...".
    """
    try:
        return compiled(template).render(view=view(document))
    except (KeyError, TypeError, AttributeError, ValueError, UndefinedError) as error:
        name, _, rest = remedy.partition("; ")
        raise UsageError(f"{name} is not whole ({type(error).__name__}: {error}); {rest}") from error
