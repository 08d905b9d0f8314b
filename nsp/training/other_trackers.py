"""Trackers of accelerate beside our own: wandb, comet_ml, aim and others, by its `log_with`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig, counted
from nsp.training.recorders import Recorder, Status, flat
from nsp.values import nearest

_OURS = {
    "tensorboard": "TensorBoard is recorded without it, in the run folder or --log-dir",
    "mlflow": "give --mlflow local, a folder or a server's URI",
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is unknown to accelerate, or not installed."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) not in _OURS]
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name in _OURS:
            raise ConfigError(f"--log-with {name} is not needed: {_OURS[name]}")
        if name not in known:
            raise ConfigError(f"--log-with {name!r} is unknown{nearest(name, known)}")
        if name not in installed:
            raise ConfigError(f"--log-with {name} needs its package; run: pip install {name}")


class OtherTrackers(Recorder):
    """A Recorder that hands everything to the trackers of an Accelerator made with `log_with`.

    They count the steps of all phases together, because some of them take no smaller step than the
    one before. A resumed run is a new run for them.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        self.name = ", ".join(config.tracking.log_with)
        self._accelerator, self._config = accelerator, config
        self._is_open = False
        self._phase, self._before = "", 0

    def configuration(self) -> None:
        """Begin the run at each tracker."""
        if not self._is_open:
            self._accelerator.trackers = []  # those that an error left half open
            project = self._config.tracking.experiment
            self._accelerator.init_trackers(project, config=flat(self._config.to_dict()))
            self._is_open = True

    def phase(self, name: str, step: int) -> None:
        """Remember the phase and the steps of those before it."""
        names = [each.name for each in self._config.phases]
        earlier = self._config.phases[: names.index(name)]
        self._phase, self._before = name, sum(counted(each.steps) for each in earlier)

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Record numbers."""
        self.configuration()
        named = {f"{self._phase}/{name}": value for name, value in values.items()}
        self._accelerator.log(named, step=self._before + step)

    def picture(self, step: int, name: str, picture: NDArray[np.uint8], when: float) -> None:
        """Record one picture (H, W, 3) with the trackers that take pictures."""
        self.configuration()
        for tracker in self._accelerator.trackers:
            log_images: Any = getattr(tracker, "log_images", None)
            if log_images is not None:
                log_images({f"{self._phase}/{name}": picture[None]}, step=self._before + step)

    def finish(self, status: Status) -> None:
        """End the run at each tracker."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
