import io
import logging
import sys
import time

from nsp.console import terminal
from nsp.console.terminal import logs_on_stderr, progress_bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_every_activity_is_one_line(capsys):
    with logs_on_stderr(verbose=False), progress_bar() as show:
        for activity in ("one", "two"):
            for done in range(3):
                show(activity, done + 1, 3)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["one", "two"]
    assert captured.out == ""


def test_on_a_terminal_the_bar_reaches_the_total_and_leaves_stdout_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with progress_bar() as show:
        show("scales [1/2]", 1, 2)
        print("result")
        show("scales [1/2]", 2, 2)
    assert "2/2" in screen.getvalue()
    assert "scales [1/2]" in screen.getvalue()
    assert capsys.readouterr().out == "result\n"


def test_a_warning_is_shown_once_and_levels_are_restored(capsys):
    ours, theirs = logging.getLogger("nsp.test"), logging.getLogger("other.package")
    before = logging.getLogger("nsp").level
    with logs_on_stderr(verbose=False):
        for _ in range(2):
            ours.warning("cut")
            ours.info("said")
            ours.debug("hidden")
            theirs.info("hidden")
    assert capsys.readouterr().err.splitlines() == ["warning: cut", "said", "said"]
    assert logging.getLogger("nsp").level == before
    ours.warning("after")
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_long_activity_is_reported_again(monkeypatch, caplog):
    monkeypatch.setattr(terminal, "QUIET_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    with terminal.progress_bar() as show:
        show("step tensorrt: compiling", 3, 10)
        deadline = time.monotonic() + 10
        while len(caplog.messages) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    first, *again = caplog.messages
    assert first == "step tensorrt: compiling"
    assert len(again) >= 2
    assert all(line.startswith("step tensorrt: compiling: 3 of 10, for ") for line in again)
    count = len(caplog.messages)
    time.sleep(0.2)
    assert len(caplog.messages) == count  # it ends with the block
