"""Exit codes, the one line that an error is, and what the help costs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fettle
from fettle import errors
from fettle.cli import main as entry

ROOT = Path(__file__).resolve().parent.parent.parent


def fettle_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fettle.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=100,
    )


def raising(error: BaseException) -> Any:
    """A verb that fails."""

    def run() -> None:
        """Fail."""
        raise error

    return SimpleNamespace(run=run)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.UsageError("bits is 9"), 2, "error: bits is 9"),
        (errors.DiskFullError("no room"), 3, "error: no room"),
        (MemoryError(), 3, "error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "error: not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x.safetensors"), 3, "error: not enough disk"),
        (errors.CheckpointError("truncated"), 4, "error: truncated"),
        (errors.QualityGateError("too far"), 5, "error: too far"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (errors.InterruptedRunError("stopped by SIGTERM"), 130, "error: stopped by SIGTERM"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied"),
        (ValueError("odd"), 1, "error: a defect of fettle: ValueError: odd"),
    ],
)
def test_every_error_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setitem(sys.modules, "fettle.cli.methods", raising(error))
    monkeypatch.delenv("FETTLE_DEBUG", raising=False)
    assert entry.main(["methods"]) == code
    said = capsys.readouterr()
    assert said.err.startswith(line)
    assert "Traceback" not in said.err
    assert said.out == ""


def test_the_traceback_comes_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fettle.cli.methods", raising(ValueError("odd")))
    monkeypatch.setenv("FETTLE_DEBUG", "1")
    assert entry.main(["methods"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_unknown_verb_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["compres"]) == 2
    assert "unknown verb 'compres'; did you mean 'compress'?" in capsys.readouterr().err


def test_an_unknown_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--versoin"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no such option: --versoin")
    assert said.count("\n") == 1


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fettle {fettle.__version__}\n"


def test_no_arguments_show_the_help_with_verbs_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) == 0
    shown = capsys.readouterr().out
    for word in (*entry.VERBS, "Exit codes:", "130  interrupted"):
        assert word in shown


@pytest.mark.parametrize("verb", entry.VERBS)
def test_every_verb_has_a_help_with_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert entry.main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  fettle {verb}" in shown.split("Example", 1)[1]
    assert "--json" in shown


def test_help_and_version_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from fettle.cli.main import main; main(['--help']); main(['--version']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_closed_pipe_ends_quietly() -> None:
    shell = subprocess.run(
        [
            "bash",
            "-c",
            f'"{sys.executable}" -m fettle.cli.main methods --json | head -c 1 >/dev/null; echo "${{PIPESTATUS[0]}}"',
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stderr == ""
    assert int(shell.stdout) in (0, entry.BROKEN_PIPE)  # 0 where the pipe took all before it was closed


def test_json_is_the_only_thing_on_standard_output() -> None:
    done = fettle_process("methods", "--json")
    assert done.returncode == 0
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["schema"], found["command"]) == (1, "methods")


def test_a_pipe_gets_no_colour_and_no_colour_is_honoured_on_a_terminal() -> None:
    assert "\x1b[" not in fettle_process("methods").stdout
    code = (
        "import os, pty, sys; read = lambda fd: os.read(fd, 65536); "
        "sys.exit(pty.spawn([sys.executable, '-m', 'fettle.cli.main', 'methods'], read) >> 8)"
    )
    coloured = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "TERM": "xterm-256color"}, check=True
    )
    plain = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"},
        check=True,
    )
    assert b"\x1b[1m" in coloured.stdout
    assert b"\x1b[3" not in plain.stdout


def test_sigterm_ends_a_verb_with_130() -> None:
    code = (
        "import os, signal, sys, types, fettle.cli.main as m\n"
        "def run():\n"
        "    'Wait.'\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.modules['fettle.cli.methods'] = types.SimpleNamespace(run=run)\n"
        "sys.exit(m.main(['methods']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted")
