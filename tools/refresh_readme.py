"""Runs the README's example session and puts what it printed between the markers.

    python tools/refresh_readme.py

Every line of the session that begins with `$ ` is run by a shell in an empty folder, in order; its output replaces what
stood below it. Standard error (progress, notes) is left out. The figures are this machine's of that day.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
SESSION = re.compile(r"(<!-- session:begin -->\n```console\n)(.*?)(```\n<!-- session:end -->)", re.DOTALL)


def run_session(commands: list[str]) -> str:
    """The session's text: each command and what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            done = subprocess.run(
                command,
                shell=True,
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                env={**os.environ, "PATH": path},
                check=True,
            )
            printed = [line.rstrip() for line in done.stdout.splitlines()]
            lines += [f"$ {command}", *(line for line in printed if line), ""]
    return "\n".join(lines[:-1]) + "\n"


def main() -> int:
    """Rewrites the README; returns the exit code."""
    text = README.read_text(encoding="utf-8")
    found = SESSION.search(text)
    if found is None:
        print("README.md has no session between its markers", file=sys.stderr)
        return 1
    commands = [line[2:] for line in found[2].splitlines() if line.startswith("$ ")]
    README.write_text(text[: found.start(2)] + run_session(commands) + text[found.end(2) :], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
