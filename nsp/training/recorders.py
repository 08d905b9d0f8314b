"""The recorders behind a tracker: TensorBoard's event files, and a run in an MLflow store.

They write what they are given and let their library's errors through; nsp/training/tracking.py
keeps these away from training. After an error a recorder is called again with the next record.
"""

import importlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError, MissingExtraError
from nsp.family.recipe import DATABASES, LOCAL
from nsp.files import read_json, write_file

Status = Literal["finished", "stopped", "failed"]

_MAX_PARAM = 500  # characters of a parameter: the limit of the oldest servers
_PARAMS_PER_REQUEST = 100  # MLflow's limits
_METRICS_PER_REQUEST = 1000
_STEP_TAG = "nsp.step."  # MLflow's tag of the last step of a phase
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the second: not a run id at all


class Recorder(Protocol):
    """Writes records; called from one thread, and again after an error.

    A recorder may leave the last three as they are.
    """

    name: str = ""

    def configuration(self) -> None:
        """Record the run's configuration."""

    def phase(self, name: str, step: int) -> None:
        """Remember where the next records belong; does no I/O."""

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Record numbers; `when` in seconds since 1970."""

    def picture(self, step: int, name: str, picture: NDArray[np.uint8], when: float) -> None:
        """Record one picture (H, W, 3)."""

    def flush(self) -> None:
        """Write all records that are still in memory; called when no other record waits."""
        return

    def finish(self, status: Status) -> None:
        """Record how the run ended."""
        return

    def reset(self) -> None:
        """Discard what an error may have left half done."""
        return


class TensorBoard(Recorder):
    """Event files: the configuration in `folder`, every phase in its own folder inside it.

    Phases have their own folders because each counts its steps from 0, and a restart hides all
    later steps in a folder. TensorBoard's RecordWriter writes the events to a file that we open.
    SummaryWriter is not used: it has a second thread, which prints a traceback when the disk is
    full, and it names the files of two starts within one second in no reliable order.
    """

    name = "TensorBoard"

    def __init__(self, run: Mapping[str, Any], folder: Path) -> None:
        self._event = _module("tensorboard.compat.proto.event_pb2", "tensorboard", "train")
        self._records = _module("tensorboard.summary.writer.record_writer", "tensorboard", "train")
        self._summary = _module("torch.utils.tensorboard.summary", "tensorboard", "train")
        self._run, self._root = run, folder
        self._folder = folder
        self._first: int | None = 0  # from this step on, a new file replaces older ones
        self._file: BinaryIO | None = None

    def configuration(self) -> None:
        """Record the configuration as text."""
        text = json.dumps(self._run, indent=1)
        self._write([self._summary.text("config", f"```json\n{text}\n```")], 0, time.time())

    def phase(self, name: str, step: int) -> None:
        """Continue in the phase's folder after `step`."""
        self.reset()
        self._folder, self._first = self._root / name, step + 1

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Record numbers."""
        self._write([self._summary.scalar(*item) for item in values.items()], step, when)

    def picture(self, step: int, name: str, picture: NDArray[np.uint8], when: float) -> None:
        """Record one picture."""
        self._write([self._summary.image(name, picture, dataformats="HWC")], step, when)

    def reset(self) -> None:
        """Close the file: the next record starts another."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # already reported by the write
                file.close()

    def _write(self, summaries: list[Any], step: int, when: float) -> None:
        event, events = self._event.Event, []
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # files are read in order of names, so a restart within the same second must sort later
            name = f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}"
            self._file = (self._folder / name).open("xb")
            events.append(event(wall_time=when, file_version="brain.Event:2"))
            if self._first is not None:
                log = self._event.SessionLog(status=self._event.SessionLog.START)
                events.append(event(wall_time=when, step=self._first, session_log=log))
        events += [event(wall_time=when, step=step, summary=each) for each in summaries]
        writer = self._records.RecordWriter(self._file)
        for each in events:
            writer.write(each.SerializeToString())
        writer.flush()
        self._first = None


class Mlflow(Recorder):
    """One MLflow run; `folder`/mlflow.json says which, so that a resumed run continues it.

    MLflow's own asynchronous queue is not used: it has no bound, sends from ten threads in no
    order, drops what a request lost, logs every loss, and the process waits for it at its end
    (500 records of a server that does not answer: 500 errors, 54 s with a timeout of one second).
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        folder: Path,
        *,
        address: str,
        experiment: str,
        run_name: str | None,
        tags: Mapping[str, str],
    ) -> None:
        self._mlflow = _module("mlflow", "mlflow", "mlflow")
        self._uri = tracking_uri(address, folder)
        self.name = f"MLflow ({self._uri})"
        scheme = urlsplit(self._uri).scheme.split("+")[0]
        if scheme in DATABASES and importlib.util.find_spec("sqlalchemy") is None:
            raise ConfigError(
                f"mlflow: a {scheme} store needs all of MLflow, but only its client is installed; "
                "run: pip install mlflow, or give a folder or a server"
            )
        self._run, self._note = run, folder / "mlflow.json"
        self._experiment = experiment
        self._run_name, self._tags = run_name or folder.resolve().name, dict(tags)
        self._client: Any = None
        self._kept: list[tuple[str, Any]] = []  # phase and metric
        self._run_id: str | None = None
        self._recorded: dict[str, int] = {}  # last step of each phase in MLflow at the start
        self._last: dict[str, int] = {}  # last step of each phase in MLflow now
        self._phase = ""

    def configuration(self) -> None:
        """Record the configuration as a file; its values are the run's parameters."""
        self._open()
        self._client.log_dict(self._run_id, self._run, "config.json")

    def phase(self, name: str, step: int) -> None:
        """Continue in the phase, after the steps that MLflow already has."""
        self._phase = name
        self._recorded = dict(self._last)

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Collect numbers until no other record waits, or until one request is full."""
        if step <= self._recorded.get(self._phase, -1):
            return
        if len(self._kept) + len(values) > _METRICS_PER_REQUEST:
            self.flush()
        metric, milliseconds, phase = self._mlflow.entities.Metric, int(when * 1000), self._phase
        self._kept += [
            (phase, metric(f"{phase}/{name}", value, milliseconds, step))
            for name, value in values.items()
        ]
        self._last[phase] = step

    def flush(self) -> None:
        """Send the numbers, and in the same request the last step; keep them if sending fails."""
        if not self._kept:
            return
        self._open()
        metrics, tag = [metric for _, metric in self._kept], self._mlflow.entities.RunTag
        tags = [tag(f"{_STEP_TAG}{phase}", str(step)) for phase, step in self._last.items()]
        self._client.log_batch(self._run_id, metrics=metrics, tags=tags)
        self._kept = []

    def picture(self, step: int, name: str, picture: NDArray[np.uint8], when: float) -> None:
        """Record one picture as a file, which a repeated step replaces."""
        self._open()
        path = f"{self._phase}/{name}/step{step:06d}.png"
        self._client.log_image(self._run_id, picture, artifact_file=path)

    def finish(self, status: Status) -> None:
        """Record how the run ended."""
        self._open()
        self.flush()
        words = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self._run_id, words[status])

    def _open(self) -> None:
        """Continue or create the run; afterwards there is one, with its parameters."""
        if self._run_id is not None:
            return
        client = self._mlflow.MlflowClient(self._uri)
        run = self._previous(client)
        if run is None:
            experiment = self._experiment_id(client)
            run = client.create_run(experiment, run_name=self._run_name, tags=self._tags)
            with write_file(self._note) as partial_note:
                note = {"uri": self._uri, "run_id": run.info.run_id}
                partial_note.write_text(json.dumps(note) + "\n")
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        parameters = [  # MLflow refuses to change a parameter; config.json has the run as it is now
            self._mlflow.entities.Param(name, str(value)[:_MAX_PARAM])
            for name, value in flat(self._run).items()
            if name not in run.data.params
        ]
        for first in range(0, len(parameters), _PARAMS_PER_REQUEST):
            batch = parameters[first : first + _PARAMS_PER_REQUEST]
            client.log_batch(run.info.run_id, params=batch)
        for tag, value in run.data.tags.items():
            if tag.startswith(_STEP_TAG):
                self._skip(tag.removeprefix(_STEP_TAG), int(value))
        self._client, self._run_id = client, run.info.run_id

    def _skip(self, phase: str, step: int) -> None:
        """Skip metrics of this phase up to `step`: the run already has them."""
        self._kept = [each for each in self._kept if each[0] != phase or each[1].step > step]
        self._last[phase] = max(step, self._last.get(phase, -1))
        self._recorded[phase] = max(step, self._recorded.get(phase, -1))

    def _previous(self, client: Any) -> Any:
        """Return the run that the note names, if it is in this store and still exists."""
        with suppress(FileNotFoundError, ValueError):  # after a damaged note, a new run begins
            note = read_json(self._note)
            if note.get("uri") == self._uri:
                try:
                    run = client.get_run(note.get("run_id"))
                except self._mlflow.MlflowException as error:
                    if error.error_code not in _GONE:
                        raise
                else:
                    return run if run.info.lifecycle_stage == "active" else None
        return None

    def _experiment_id(self, client: Any) -> str:
        """Return the experiment of that name, created when there is none."""
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(client.create_experiment(self._experiment))
            except self._mlflow.MlflowException:  # another run may have created it just now
                found = client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        return str(found.experiment_id)


def tracking_uri(address: str, folder: Path) -> str:
    """Return the URI of "local" (in the run folder), of another folder, or `address` itself."""
    if "://" in address:
        return address
    return (folder / "mlflow" if address == LOCAL else Path(address)).resolve().as_uri()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries and lists as one flat dictionary: {"phases.0.steps": 3}."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _module(module: str, package: str, extra: str) -> Any:
    """Return an optional package's module, or raise MissingExtraError."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(package, extra) from error
