"""Child processes that run this same package, whatever the current folder contains."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self


class Child:
    """A running `python -m module`; neither it nor what it starts outlives the `with` block.

    It is asked to stop by the end of its input. Ctrl-C reaches only this process, which stops it.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        changes: Mapping[str, str] | None = None,
        grace_s: float = 1.0,
    ) -> None:
        self._grace_s = grace_s
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            env=environment(changes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        self._said: deque[str] = deque(maxlen=100)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Read stderr as it comes: a full pipe would stop the child."""
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self._said.extend(lines)

    @contextmanager
    def time_limit(self, seconds: float, *, politely: bool = True) -> Iterator[threading.Event]:
        """Stop or kill the child after `seconds`; yield an event that is set when that happens."""
        reached = threading.Event()

        def end() -> None:
            reached.set()
            self.stop() if politely else self.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield reached
        finally:
            timer.cancel()

    def stop(self) -> None:
        """Ask the child to stop, and kill it with its group if it does not within its time."""
        try:
            with suppress(BrokenPipeError):
                self.input.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self._grace_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the child and what it has started."""
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        """Return the last line on stderr of a child that has ended, or ""."""
        self._listener.join(self._grace_s)
        return next((line for line in map(str.strip, reversed(self._said)) if line), "")

    def __enter__(self) -> Self:
        """Return the child."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the child."""
        self.stop()
        self._listener.join(self._grace_s)
        self.output.close()


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with `changes`, so that children import this package.

    Run them as `[sys.executable, "-P", "-m", "nsp…"]`: -P keeps the current folder off their path.
    """
    root = str(Path(__file__).absolute().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = root if not inherited else os.pathsep.join((root, inherited))
    return {**os.environ, **(changes or {}), "PYTHONPATH": path}
