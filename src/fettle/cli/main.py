"""`fettle`: picks the verb, runs it, and turns whatever goes wrong into one line and an exit code.

Importing this module costs milliseconds: a verb's module, and torch behind it, is imported when the verb is called, so
that `fettle --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.metadata
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated

import typer

from fettle.cli.flags import parse
from fettle.errors import FettleError, InterruptedRunError, ResourceError, UsageError, unknown_word

VERBS = {
    "plan": "Predict bytes, memory and time; try one block.",
    "compress": "Make a model smaller; resumes where it was stopped.",
    "train": "Distil, heal, train codes or adapters; resumes as well.",
    "evaluate": "Measure a written model, alone or against its original.",
    "generate": "Complete a prompt, or talk.",
    "bench": "Measure how fast a model runs here.",
    "inspect": "Show what a model is made of.",
    "cache": "Measure a key-value cache kept in 8, 4 or 2 bits.",
    "diagnose": "Show which linears are sensitive, and why.",
    "methods": "List the compression methods and their fields.",
    "demo": "Compress the embedded model and compare it with the original.",
    "report": "Make one HTML page of result files.",
}
EXIT_CODES = """\b
Exit codes:
  0    fine
  1    a defect of fettle; FETTLE_DEBUG=1 shows the traceback
  2    usage: a flag, a recipe or a value that cannot be
  3    not enough memory or disk
  4    bad model: damaged, unsafe, unknown or not finite
  5    a quality gate failed (evaluate --max-kl)
  130  interrupted; the same command resumes
"""
BROKEN_PIPE = 141  # what a shell shows for a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sign that the terminal cannot show is no reason to die
    try:
        with _terminate_as_interrupt(), warnings.catch_warnings():
            if not sys.warnoptions and not _debugging():
                warnings.simplefilter("ignore")  # other libraries' advice to their developers
            code = _dispatch(arguments)
            sys.stdout.flush()
            return code
    except BaseException as error:
        return _explain(error)


def entry() -> int:
    """What the command `fettle` runs: `main`, and after an interruption no wait for threads that still compute."""
    code = main()
    if code == InterruptedRunError.exit_code:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    return code


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in VERBS:
        verb = arguments[0]
        module = importlib.import_module(f"fettle.cli.{verb}")
        work = parse(module.run, arguments[1:], f"fettle {verb}")
        if work is not None:
            work()
        return 0
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(unknown_word("verb", arguments[0], VERBS))
    _parse_root(arguments or ["--help"])
    return 0


def _parse_root(arguments: list[str]) -> None:
    """`fettle --help` and `fettle --version`; the verbs here are only names for the listing."""
    app = typer.Typer(
        add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
    )

    def root(
        version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
    ) -> None:
        if version:
            typer.echo(f"fettle {importlib.metadata.version('fettle-llm')}")
            raise typer.Exit

    app.callback(
        invoke_without_command=True,
        help="Make a pretrained language model small, fast and cheap to run, and prove what that cost.\n\n"
        "MODEL is a local folder, a hub id, or the word demo (a small real model that comes with fettle).\n\n"
        "\b\nExample:\n  fettle compress demo -o small --recipe gptq-4bit\n  fettle evaluate small --reference demo",
        epilog=EXIT_CODES,
    )(root)
    for verb, summary in VERBS.items():
        app.command(verb, help=summary)(lambda: None)
    try:
        app(args=arguments, prog_name="fettle", standalone_mode=False)
    except typer.TyperException as error:
        raise UsageError(f"{_sentence(error.format_message())}. See: fettle --help") from None


def _sentence(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


def _explain(error: BaseException) -> int:
    """One line on stderr for an error, and the exit code that it means."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError):  # whatever Python still flushes at exit has nowhere to go either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if _debugging():
        traceback.print_exception(error)
    known = _as_fettle_error(error)
    if known is not None:
        _say(f"error: {known}")
        return known.exit_code
    _say(f"error: a defect of fettle: {type(error).__name__}: {' '.join(str(error).split())}")
    _say("Run it again with FETTLE_DEBUG=1 and report the traceback, the command and `fettle --version`.")
    return 1


def _as_fettle_error(error: BaseException) -> FettleError | None:
    """The project's own error for one of Python's, torch's or the system's, where there is one."""
    if isinstance(error, FettleError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError(
            "interrupted; a compression or a training goes on when the same command is run again"
        )
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return ResourceError(
            f"not enough memory: {error or 'an allocation failed'}; `fettle plan` predicts what is needed"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"not enough disk: {error}")
    if isinstance(error, OSError) and error.filename is not None:
        return UsageError(f"{error.filename}: {error.strerror}")
    return None


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _debugging() -> bool:
    return os.environ.get("FETTLE_DEBUG", "") not in ("", "0")


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a verb as Ctrl-C does, so that it cleans up and says 130."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(entry())
