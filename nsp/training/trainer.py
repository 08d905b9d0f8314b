"""The training loop: one phase of one run, for any family, on whatever devices accelerate finds."""

import dataclasses
import json
import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler

from nsp.errors import CheckpointError, ConfigError
from nsp.sheet import contact_sheet
from nsp.training.config import OptimizerConfig, PhaseConfig
from nsp.training.objective import Objective
from nsp.training.progress import Progress
from nsp.training.schedules import lr_ratio, weight_decay
from nsp.training.state import read_state, write_state

logger = logging.getLogger(__name__)

STATE_NAME = "state.pt"


class _AtEpoch(Dataset[Mapping[str, Any]]):
    """A data set read by (epoch, index), so that workers that read ahead see the right epoch."""

    def __init__(self, data: Dataset[Mapping[str, Any]]) -> None:
        self.data = data
        self._set_epoch = getattr(data, "set_epoch", None)

    def __getitem__(self, key: tuple[int, int]) -> Mapping[str, Any]:
        epoch, index = key
        if self._set_epoch is not None:
            self._set_epoch(epoch)
        return self.data[index]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for steps `start` .. `steps` - 1, each a function of (seed, step).

    Every epoch is a new permutation, cut into whole batches, so a run resumed at step k sees what
    it would have seen.
    """

    def __init__(self, size: int, batch_size: int, steps: int, *, start: int, seed: int) -> None:
        if batch_size > size:
            raise ConfigError(
                f"batch_size={batch_size} exceeds the {size} pictures of the data set"
            )
        self.size, self.batch_size, self.steps = size, batch_size, steps
        self.start, self.seed = start, seed

    def __len__(self) -> int:
        """Return the number of batches left."""
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the (epoch, index) pairs of every step."""
        per_epoch = self.size // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.size, generator=generator)
            first = step % per_epoch * self.batch_size
            indices = order[first : first + self.batch_size].tolist()
            yield [(epoch, index) for index in indices]


def parameter_groups(objective: Objective) -> list[dict[str, Any]]:
    """Return AdamW groups: with weight decay (`decayed` true) and without."""
    named = [(n, p) for n, p in objective.trained.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if objective.decays(n, p) is decayed], "decayed": decayed}
        for decayed in (True, False)
    ]


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, steps: int
) -> float:
    """Set learning rate and weight decay of every group for `step`; return the learning rate."""
    ratio = lr_ratio(
        step,
        steps,
        kind=config.schedule,
        warmup_steps=config.warmup_steps,
        warmup_start=config.warmup_start,
        end=config.final_ratio,
    )
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    decay = weight_decay(step, steps, start=config.weight_decay, end=end)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * ratio
        group["weight_decay"] = decay if group["decayed"] else 0.0
    return config.lr * ratio


@dataclass
class Phase:
    """One phase under way: build it, `run` it; then `weights` are those to ship.

    These are the averaged ones where EMA is on.
    """

    config: PhaseConfig
    objective: Objective
    accelerator: Accelerator
    folder: Path  # of this phase: state.pt, samples/, log.jsonl
    seed: int
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Create optimizer, average and data order; continue from state.pt where there is one."""
        self.step = 0
        settings = self.config.optimizer
        beta1, beta2 = settings.betas
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.objective), lr=settings.lr, betas=(beta1, beta2), fused=True
        )
        self.average: AveragedModel | None = None
        if self.config.ema_decay:
            # torch's swa_utils has no annotations
            average = get_ema_multi_avg_fn(self.config.ema_decay)  # type: ignore[no-untyped-call]
            trained = self.objective.trained
            self.average = AveragedModel(trained, multi_avg_fn=average, use_buffers=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        self.module, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= self.config.steps

    @property
    def weights(self) -> nn.Module:
        """The module whose weights are to be shipped."""
        return self.objective.trained if self.average is None else self.average.module

    def run(self) -> None:
        """Train to the last step; state.pt is current after an interruption too.

        After an error it stays as it was last saved: what led there may be in the weights.
        """
        loader = self._loader()
        started = time.monotonic()
        try:
            with Progress(self.config, self.step, self.folder / "log.jsonl") as progress:
                for batch in loader:
                    metrics = self._train_step(batch)
                    self.step += 1
                    progress.advance(self.step, metrics)
                    if self.step % self.config.sample_every == 0 or self.done:
                        self._write_samples()
                    if self.step % self.config.checkpoint_every == 0:
                        self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        self.save()
        logger.info(
            "%s: %d steps in %.0f s", self.config.name, self.step, time.monotonic() - started
        )

    def adopt_average(self) -> None:
        """Leave the averaged weights in the trained modules: later phases build on these."""
        if self.average is not None:
            self.objective.trained.load_state_dict(self.average.module.state_dict())

    def _loader(self) -> DataLoader[Mapping[str, Any]]:
        """Return the batches that are left."""
        dataset = self.objective.dataset()
        assert isinstance(dataset, Sized)  # StepSampler draws indices, so it must be map-style
        sampler = StepSampler(
            len(dataset), self.config.batch_size, self.config.steps, start=self.step, seed=self.seed
        )
        loader = DataLoader(_AtEpoch(dataset), batch_sampler=sampler, num_workers=self.num_workers)
        prepared: DataLoader[Mapping[str, Any]] = self.accelerator.prepare(loader)
        return prepared

    def _step_seed(self) -> int:
        """Return the seed of this step on this process."""
        phase = zlib.crc32(self.config.name.encode())
        key = (self.seed, phase, self.step, self.accelerator.process_index)
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)

    def _train_step(self, batch: Mapping[str, Any]) -> dict[str, Tensor | float]:
        """Make one optimizer step; return the metrics to report."""
        self.module.train()
        # What is random in a step depends on the step alone: a resumed run needs no random state.
        torch.manual_seed(self._step_seed())
        rate = set_rates(self.optimizer, self.config.optimizer, self.step, self.config.steps)
        with self.accelerator.autocast():
            metrics = self.module(batch)
        if not torch.isfinite(metrics["loss"]):
            raise CheckpointError(
                f"phase {self.config.name}: the loss is {metrics['loss'].item()} at step "
                f"{self.step}; lower the learning rate ({self.config.optimizer.lr}) and start again"
            )
        self.accelerator.backward(metrics["loss"])
        norm = self.accelerator.clip_grad_norm_(
            self.objective.trained.parameters(), self.config.optimizer.grad_clip
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        extra = self.objective.after_step(self.step)
        if self.average is not None:
            self.average.update_parameters(self.objective.trained)
        detached = {name: value.detach() for name, value in metrics.items()}
        return {**detached, "grad_norm": norm, "lr": rate, **extra}

    def _write_samples(self) -> None:
        """Write a contact sheet of the current (averaged) weights."""
        if not self.accelerator.is_main_process:
            return
        self.objective.eval()
        with shipped_weights(self):
            pictures, titles = self.objective.samples(self.seed)
        path = self.folder / "samples" / f"step{self.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        contact_sheet(pictures, titles).save(path)

    def save(self) -> None:
        """Write state.pt: weights, average, optimizer and step."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "config": json.dumps(self.config.to_dict()),
            "step": self.step,
            "trained": self.objective.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        write_state(self.folder / STATE_NAME, state)

    def _restore(self) -> None:
        """Continue from state.pt if it exists."""
        path = self.folder / STATE_NAME
        if not path.exists():
            return
        saved, state = read_state(path)
        if dataclasses.replace(saved, steps=self.config.steps) != self.config:
            raise ConfigError(
                f"{path} belongs to a run with other settings; "
                "use the same preset or another --output-dir"
            )
        self.step = state["step"]
        try:
            self.objective.trained.load_state_dict(state["trained"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} does not fit this model ({reason[:200]}); restore the file of this run, "
                "or delete it to start the phase again"
            ) from error


class shipped_weights:
    """Context in which the trained modules carry the weights to ship; the live ones come back."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def __enter__(self) -> None:
        """Swap the average in."""
        self._swap()

    def __exit__(self, *exc: object) -> None:
        """Swap the live weights back."""
        self._swap()

    def _swap(self) -> None:
        average = self.phase.average
        if average is None:
            return
        pairs = zip(
            self.phase.objective.trained.parameters(), average.module.parameters(), strict=True
        )
        with torch.no_grad():
            for live, averaged in pairs:
                kept = live.clone()
                live.copy_(averaged)
                averaged.copy_(kept)
