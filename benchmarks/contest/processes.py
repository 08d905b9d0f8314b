"""Fresh processes: what must not be measured in a process that already did something else.

There is one protocol. The child runs a program, which is a generator: it gets jobs, one line of
JSON each, and answers each with another line. See `nsp.benchmarks.contest.child`.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from nsp import child
from nsp.errors import BackendError

TIMEOUT_S = 900  # for one answer
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Child:
    """A running program; every job has `started_ns`, the clock just before it was started."""

    def __init__(self, program: str, *, threads: int) -> None:
        self._program, self.started_ns = program, time.monotonic_ns()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nsp.benchmarks.contest.child", program],
            env=child.environment(dict.fromkeys(_THREAD_VARIABLES, str(threads))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self._said: list[str] = []
        # Read as it comes: a full pipe would stop the child.
        self._listener = threading.Thread(target=self._said.extend, args=(self.process.stderr,))
        self._listener.start()

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer; BackendError with the child's last words, or after 15 minutes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Timer(TIMEOUT_S, self.process.kill)
        late.start()
        try:
            message = json.dumps({**job, "started_ns": self.started_ns})
            self.process.stdin.write(message + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            in_time = late.is_alive()
            late.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        said = [text for text in map(str.strip, self._said) if text]
        reason = said[-1] if said else f"exit code {self.process.returncode}"
        if not in_time:
            reason = f"no answer within {TIMEOUT_S} s"
        raise BackendError(f"{self._program} failed in its own process: {reason}")

    def close(self) -> None:
        """End the process; one that has answered and gone is left alone."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def running(program: str, *, threads: int) -> Iterator[Child]:
    """Yield a program, "module:generator", that computes with so many threads."""
    started = Child(program, threads=threads)
    try:
        yield started
    finally:
        started.close()


def ask_once(program: str, job: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Return a program's only answer, from a process of its own."""
    with running(program, threads=threads) as started:
        return started.ask(job)
