"""Fresh processes: what must not be measured in a process that already did something else.

There is one protocol. The child runs a program, which is a generator: it gets jobs, one line of
JSON each, and answers each with another line. See `nsp.benchmarks.contest.child`.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from nsp import child
from nsp.errors import BackendError

TIMEOUT_S = 900  # for one answer
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Child(child.Child):
    """A running program, "module:generator", that computes with so many threads.

    Every job has `started_ns`, the clock just before the program was started.
    """

    def __init__(self, program: str, *, threads: int) -> None:
        self._program, self.started_ns = program, time.monotonic_ns()
        changes = dict.fromkeys(_THREAD_VARIABLES, str(threads))
        super().__init__("nsp.benchmarks.contest.child", program, changes=changes)

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer; BackendError with the child's last words, or after 15 minutes."""
        with self.time_limit(TIMEOUT_S, politely=False) as late:
            try:
                message = json.dumps({**job, "started_ns": self.started_ns})
                self.input.write(message + "\n")
                self.input.flush()
                line = self.output.readline()
            except BrokenPipeError:
                line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.stop()
        reason = self.last_words() or f"exit code {self.process.returncode}"
        if late.is_set():
            reason = f"no answer within {TIMEOUT_S} s"
        raise BackendError(f"{self._program} failed in its own process: {reason}")


def ask_once(program: str, job: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """Return a program's only answer, from a process of its own."""
    with Child(program, threads=threads) as started:
        return started.ask(job)
