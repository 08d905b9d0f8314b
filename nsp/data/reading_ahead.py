"""Processes that read pictures ahead of training."""

import signal


def leave_signals_to_parent(worker: int) -> None:
    """Let this process ignore Ctrl-C and SIGTERM, which also go to the whole group of its parent.

    The parent ends its step, saves it, and ends its workers; one that died before would be an error
    of the step. A worker whose parent is gone ends by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
