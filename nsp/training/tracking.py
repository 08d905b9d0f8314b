"""Records a run for TensorBoard and MLflow: its configuration, scalars and pictures.

Each of the two has its own thread and bounded queue, so that a slow server or disk does not slow
down training. If one fails, one warning says so, and it is tried again after a minute.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsp.data.sheet import contact_sheet
from nsp.errors import ConfigError, MissingExtraError
from nsp.family.recipe import TrackingConfig
from nsp.training.recorders import Mlflow, Recorder, Status, TensorBoard

logger = logging.getLogger(__name__)

Pictures = NDArray[np.uint8] | Image.Image

_MAX_WAITING = 256  # records in a queue: more than an hour of them at the usual rate
_MAX_PICTURES_WAITING = 16  # each takes megabytes
_RETRY_S = 60.0
_CLOSE_S = 5.0  # time to send the remaining records when a run ends
_MAX_REASON = 200  # characters of an error in the warning

# MLflow reads these settings in every call and only from the environment. Without them, a server
# that is down blocks its thread for minutes. Values set by the user stay.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the queue waits and tries again
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder needs no database package
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Tracker:
    """Records a run for TensorBoard and MLflow; no method waits for them or fails with them.

    Used as `with Tracker(...) as tracker`, then `start`, and `phase` before each phase's scalars
    and pictures. The end of the block closes it; call `close` for a run stopped on request.
    """

    def __init__(self, config: TrackingConfig, *, is_main_process: bool = True) -> None:
        self._config, self._is_main_process = config, is_main_process
        self._feeds: list[_Feed] = []
        self._phase: str | None = None
        self._environment: list[str] = []  # names of the variables set here

    def start(self, run: Mapping[str, Any], folder: Path, others: Sequence[Recorder] = ()) -> None:
        """Begin recording the run that `run` describes, or continue the recording in `folder`.

        `others` are recorders beside TensorBoard and MLflow.

        Raises MissingExtraError for a package that the configuration asks for by name, and
        ConfigError for a store that the installed MLflow cannot open.
        """
        if not self._is_main_process:
            return
        recorders: list[Recorder] = [*others]
        if self._config.tensorboard is not False:
            try:
                recorders.append(TensorBoard(run, self._config.tensorboard_dir(folder)))
            except MissingExtraError as error:
                if self._config.tensorboard:
                    raise
                logger.warning("TensorBoard: %s; this run is not recorded there", error)
        if self._config.mlflow is not None:
            self._set_environment()
            try:
                recorders.append(
                    Mlflow(
                        run,
                        folder,
                        address=self._config.mlflow,
                        experiment=self._config.experiment,
                        run_name=self._config.run_name,
                        tags=self._config.tags,
                    )
                )
            except (MissingExtraError, ConfigError):
                self._restore_environment()
                raise
        self._feeds = [_Feed(recorder) for recorder in recorders]
        for feed in self._feeds:
            feed.put(feed.recorder.configuration, limit=None)

    def phase(self, name: str, step: int) -> None:
        """Begin or continue a phase; `step` of its steps are done.

        No step is recorded twice. Records of later steps, made before the run died or was rolled
        back, are replaced in TensorBoard and stay in MLflow, which cannot delete a metric.
        """
        self._phase = name
        for feed in self._feeds:
            feed.put(partial(feed.recorder.phase, name, step), limit=None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers in this phase, under the names that the run has; `step` steps are done."""
        assert self._phase is not None, "phase() comes first"
        numbers = {self._called(n): float(v) for n, v in values.items()} if self._feeds else {}
        for feed in self._feeds:
            feed.put(partial(feed.recorder.scalars, step, numbers, time.time()))

    def images(self, step: int, name: str, pictures: Pictures) -> None:
        """Record one picture, or several (N, H, W, 3) as one sheet of them."""
        assert self._phase is not None, "phase() comes first"
        if not self._feeds:
            return
        sheet = np.asarray(pictures)
        if sheet.ndim == 4:
            sheet = np.asarray(contact_sheet(sheet, [""] * len(sheet), lines=0))
        called = self._called(name)
        for feed in self._feeds:
            feed.put_picture(partial(feed.recorder.picture, step, called, sheet, time.time()))

    def _called(self, name: str) -> str:
        """Return the name under which the run's configuration has something recorded."""
        return self._config.names.get(name, name)

    def close(self, status: Status) -> None:
        """End recording; waits at most a few seconds for records that are still being sent."""
        feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.end(status)
        deadline = time.monotonic() + _CLOSE_S
        for feed in feeds:
            feed.join(deadline)
        self._restore_environment()

    def __enter__(self) -> Self:
        """Return the tracker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; the status depends on how the block ended."""
        stopped = isinstance(error, KeyboardInterrupt)
        self.close("finished" if error is None else "stopped" if stopped else "failed")

    def _set_environment(self) -> None:
        """Set the missing variables of _ENVIRONMENT, while no other thread may be reading them."""
        self._environment = [name for name in _ENVIRONMENT if name not in os.environ]
        os.environ.update({name: _ENVIRONMENT[name] for name in self._environment})

    def _restore_environment(self) -> None:
        for name in self._environment:
            os.environ.pop(name, None)
        self._environment = []


class _Feed:
    """A recorder, its thread and the records that wait for it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pictures = threading.Semaphore(_MAX_PICTURES_WAITING)
        self._closing = threading.Event()
        self._failing = self._warned = False
        self._refused = self._lost = 0  # records: refused by `put`, lost in the recorder's thread
        self._thread = threading.Thread(
            target=self._work, name=f"tracking-{recorder.name}", daemon=True
        )
        self._thread.start()

    def put(self, write: Callable[[], None], *, limit: int | None = _MAX_WAITING) -> None:
        """Queue a record, unless `limit` records are already waiting."""
        if limit is not None and self._waiting.qsize() >= limit:
            self._refused += 1
        else:
            self._waiting.put(write)

    def put_picture(self, write: Callable[[], None]) -> None:
        """Queue a picture, unless too many are already waiting in memory."""
        if self._pictures.acquire(blocking=False):
            self.put(partial(self._write_picture, write), limit=None)
        else:
            self._refused += 1

    def _write_picture(self, write: Callable[[], None]) -> None:
        self._pictures.release()
        write()

    def end(self, status: Status) -> None:
        """Let the thread end after the queued records, or at once if the recorder is failing."""
        self._closing.set()
        self.put(partial(self.recorder.finish, status), limit=None)
        self._waiting.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the thread until `deadline` (monotonic seconds), then report lost records."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        waiting = self._waiting.qsize()
        if lost := self._refused + self._lost + max(0, waiting - 1):  # None is not a record
            level = logging.INFO if self._warned else logging.WARNING
            name = self.recorder.name
            logger.log(level, "%s: %d or more records of this run are missing", name, lost)
        self._warned = True  # a call that is still running must not log later

    def _work(self) -> None:
        while (write := self._waiting.get()) is not None:
            self._lost += not self._done(write)
            if self._waiting.empty() and not self._failing:
                self._done(self.recorder.flush)
            if self._failing and self._closing.is_set():
                break
        self.recorder.reset()

    def _done(self, write: Callable[[], None]) -> bool:
        """Return whether the recorder succeeded."""
        try:
            write()
        except Exception as error:  # from a server, a disk or a library: training continues
            self._fail(error)
        else:
            self._failing = False
        return not self._failing

    def _fail(self, error: Exception) -> None:
        """Log the first error, then pause the recorder for a while."""
        self._failing = True
        self.recorder.reset()
        if not self._warned:
            self._warned = True
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(
                "%s cannot record: %s; training continues, with a new attempt every %.0f s",
                self.recorder.name,
                reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…",
                _RETRY_S,
            )
        self._closing.wait(_RETRY_S)
