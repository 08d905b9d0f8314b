"""Everything that changes while a phase trains, and how it is saved and loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from nsp.family.recipe import PhaseConfig
from nsp.training.average import WeightAverage
from nsp.training.guard import LossGuard
from nsp.training.parallel import GATHERED

_SPREAD = StateDictOptions(full_state_dict=True)
FIRST_SCALE = 65536.0  # the first factor of fp16 losses, torch's default


class TrainingState:
    """Weights, optimizer, average, gradient scaler, position, and the guard's memory.

    There is no random state: all random numbers of a step depend on the step alone.
    """

    def __init__(
        self,
        config: PhaseConfig,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any = None,
    ) -> None:
        self.step = 0  # optimizer steps made
        self.offset = 0  # data steps left out by rollbacks
        self.rollbacks = 0
        self.guard = LossGuard(config.guard)
        self.average: WeightAverage | None = None
        if config.ema_decay:
            self.average = WeightAverage(trained.parameters(), config.ema_decay)
        self._trained, self._optimizer, self._scaler = trained, optimizer, scaler
        if scaler is not None:  # one per run, but a phase must not depend on the one before
            first = {"scale": FIRST_SCALE, "_growth_tracker": 0}
            scaler.load_state_dict({**scaler.state_dict(), **first})

    def gather(self) -> dict[str, Any]:
        """Return everything as unsharded tensors and numbers; every process must call this."""
        trained, optimizer = self._trained, self._optimizer
        return {
            "step": self.step,
            "offset": self.offset,
            "rollbacks": self.rollbacks,
            "guard": self.guard.memory,
            "trained": get_model_state_dict(trained, options=GATHERED),
            "optimizer": get_optimizer_state_dict(trained, optimizer, options=GATHERED),
            "average": None if self.average is None else self.average.full_tensors(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `gather` returned, on any number of processes.

        Raises ValueError with the reason in one line when it belongs to another model.
        """
        try:
            set_model_state_dict(self._trained, state["trained"], options=_SPREAD)
            set_optimizer_state_dict(
                self._trained, self._optimizer, state["optimizer"], options=_SPREAD
            )
            if self.average is not None:
                self.average.load(state["average"])
            if self._scaler is not None and state["scaler"] is not None:
                self._scaler.load_state_dict(state["scaler"])
            self.step, self.offset = state["step"], state["offset"]
            self.rollbacks, self.guard.memory = state["rollbacks"], state["guard"]
        except (RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error
