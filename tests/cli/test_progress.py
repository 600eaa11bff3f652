"""Progress lines and bars, on a clock that the test turns."""

from __future__ import annotations

import io

from rich.console import Console

from fettle.cli.progress import LineProgress, TerminalProgress, progress
from fettle.progress import Silent


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_five_seconds_and_say_the_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    with LineProgress(out, clock).task("compressing", 10) as task:
        for _ in range(4):
            clock.now += 2.0
            task.advance()
    assert out.getvalue() == "compressing: 3 of 10, 6.0 s, about 14.0 s left\n"


def test_short_work_says_nothing() -> None:
    out, clock = io.StringIO(), Clock()
    with LineProgress(out, clock).task("reading", 2) as task:
        clock.now += 1.0
        task.advance(2)
    assert out.getvalue() == ""


def test_the_end_has_no_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    with LineProgress(out, clock).task("writing", 2) as task:
        clock.now += 70.0
        task.advance(2)
    assert out.getvalue() == "writing: 2 of 2, 1 min 10 s\n"


def terminal(out: io.StringIO) -> Console:
    return Console(file=out, force_terminal=True, width=100, color_system=None)


def shown(bars: TerminalProgress) -> str:
    """What the display shows now, without waiting for its thread."""
    assert bars._bars is not None
    out = io.StringIO()
    terminal(out).print(bars._bars.get_renderable())
    return out.getvalue()


def test_a_terminal_gets_nested_bars_after_two_seconds() -> None:
    clock = Clock()
    bars = TerminalProgress(terminal(io.StringIO()), clock)
    with bars.task("blocks", 4) as outer:
        clock.now += 1.5
        with bars.task("windows", 8) as inner:
            inner.advance(2)
            assert shown(bars).strip() == ""
            clock.now += 1.0
            outer.advance()
            assert "blocks" in shown(bars)
            assert "1/4" in shown(bars)
            assert "windows" not in shown(bars)
            clock.now += 1.0
            inner.advance(2)
            assert "4/8" in shown(bars)
        assert "windows" not in shown(bars)


def test_the_display_is_gone_after_an_error() -> None:
    out, clock = io.StringIO(), Clock()
    bars = TerminalProgress(terminal(out), clock)
    try:
        with bars.task("blocks", 4) as task:
            clock.now += 3.0
            task.advance()
            raise KeyError
    except KeyError:
        pass
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # the cursor is back
    with bars.task("again", 1) as task:
        task.advance()


def test_json_in_a_pipe_is_silent() -> None:
    assert isinstance(progress(json=True), Silent)
    assert isinstance(progress(json=False), LineProgress)
