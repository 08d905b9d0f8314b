"""What every fresh process runs: `python -m nsp.benchmarks.contest.child MODULE:GENERATOR`.

The generator gets an iterator of jobs, JSON objects from the lines of standard input, and yields an
answer to each, written as a line. Jobs have `running_ns`, the monotonic clock when this program
began: until then nothing but the interpreter was loaded. What others print goes to stderr.
"""

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Answer until the input ends; exit with the message of an expected error."""
    running_ns = time.monotonic_ns()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    jobs = ({**json.loads(line), "running_ns": running_ns} for line in sys.stdin)

    from nsp.errors import NspError

    try:
        for answer in getattr(importlib.import_module(module), name)(jobs):
            print(json.dumps(answer), file=answers, flush=True)
    except NspError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
