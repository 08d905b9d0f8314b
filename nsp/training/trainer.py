"""The training loop: one phase of one run, for any family, on the devices accelerate finds."""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset

from nsp.data.dataset import batches
from nsp.data.sheet import contact_sheet
from nsp.data.stream import ShardStream
from nsp.errors import CheckpointError, ConfigError, TrainingError
from nsp.family.objective import Batch, Objective
from nsp.family.recipe import FREE_OF_PHASE, Epochs, PhaseConfig, RunConfig, Steps, counted
from nsp.files import write_file
from nsp.training.average import full
from nsp.training.checkpoints import CheckpointStore
from nsp.training.data_order import Share, sample_keys, step_seed
from nsp.training.flops import flops_per_image
from nsp.training.folder import steps_folder
from nsp.training.loading import Item, training_loader, validation_loader
from nsp.training.needs import saved_bytes
from nsp.training.optimizer import add_adapters, new_optimizer, set_rates
from nsp.training.parallel import accumulating, on_main, prepare, shard_again, whole
from nsp.training.progress import Progress
from nsp.training.state import TrainingState
from nsp.training.stopping import StopRequest
from nsp.training.tracking import Tracker

logger = logging.getLogger(__name__)


class _WentWrong(Exception):
    """The loss or the gradient went wrong; the message says how."""


class Phase:
    """One phase in training: create it and `run` it; `averaged` then has the weights to keep.

    A step's samples and random numbers depend only on (seed, step). So a run stopped after any step
    and resumed on the same number of processes gives the same weights, bit for bit if the kernels
    are deterministic (on CPUs they are). With another number of processes the weights are equal up
    to rounding, except for what torch's own generator decides (dropout, drop path).
    """

    def __init__(
        self,
        config: PhaseConfig,
        objective: Objective,
        accelerator: Accelerator,
        folder: Path,
        run: RunConfig,
        tracker: Tracker,
    ) -> None:
        self.config, self.objective, self.accelerator = config, objective, accelerator
        self.folder, self.run_config, self.tracker = folder, run, tracker
        self.held_out_loss: tuple[int, float] | None = None  # step, loss
        self.comparable = True  # whether the current step's loss can be compared with others
        self.share = share_of(config, accelerator)
        copy = None if run.copy_dir is None else Path(run.copy_dir) / folder.name
        place = steps_folder(run, folder)
        self.store = CheckpointStore(place, keep_last=config.keep_last, copy=copy)
        if config.lora is not None:
            add_adapters(objective.trained, config.lora)
        objective.to(accelerator.device)
        with accelerator.main_process_first():  # the others read what it writes
            self.data, self.held_out = objective.dataset(), self._enough(objective.held_out())
        self.flops = flops_per_image(objective, self.data, self.share.micro_batch_size)
        self.module = prepare(objective, run, accelerator)
        self.optimizer = accelerator.prepare_optimizer(new_optimizer(objective, config.optimizer))
        self.state = TrainingState(
            config, objective.trained, self.optimizer.optimizer, accelerator.scaler
        )
        self._restore()

    @property
    def step(self) -> int:
        """The number of optimizer steps made."""
        return self.state.step

    @property
    def done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= counted(self.config.steps)

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step and return True, or to a signal's and return False.

        The step is saved in both cases. After an error nothing is saved, because the cause may
        already be in the weights.
        """
        if self.done:
            return True
        self._check_space()
        started, first = time.monotonic(), self.step
        main = self.accelerator.is_main_process
        log = self.folder / "log.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.tracker.phase(self.config.name, self.step)
        with Progress(
            self.config, self.step, log, flops_per_image=self.flops, silent=not main
        ) as progress:
            while not self.done and not stop.agreed():
                try:
                    self._train(progress, stop)
                except _WentWrong as problem:
                    self._roll_back(str(problem), progress)
        self.save()
        seconds = time.monotonic() - started
        logger.info(
            "%s: %d steps in %.0f s, %.3g images/s",
            self.config.name,
            self.step - first,
            seconds,
            (self.step - first) * self.config.batch_size / max(seconds, 1e-9),
        )
        return self.done

    def _train(self, progress: Progress, stop: StopRequest) -> None:
        """Make the remaining steps, until the end or a request to stop."""
        offset, run, config = self.state.offset, self.run_config, self.config
        loader = batches(
            training_loader(
                self.data,
                self.share,
                start=self.step + offset,
                stop=counted(self.config.steps) + offset,
                seed=run.seed,
                num_workers=run.data.num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )
        )
        pending: Tensor | None = None  # gradient norm of the previous step: read one step later
        while not self.done:
            norm, metrics = self._train_step(loader)
            self._check_norm(pending)
            pending = norm
            self.state.step += 1
            progress.advance(self.step)
            saves = self.step % counted(self.config.checkpoint_every) == 0
            reports = self.step % self.config.log_every == 0 or self.done
            if saves or reports:
                self._check_norm(pending)
            if reports:
                self._report(progress, metrics)
            with progress.paused():
                # Every saved step is measured, because the best one is kept.
                if self.held_out is not None and (saves or self._is_due(config.validate_every)):
                    self._validate(progress)
                if self._is_due(self.config.sample_every):
                    self._write_samples()
                if saves and not self.done:
                    self.save()
            # All processes must wait to agree, so several of them do it only when they report.
            if (reports or self.accelerator.num_processes == 1) and stop.agreed():
                self._check_norm(pending)
                return

    def _enough(self, held_out: Dataset[Item] | None) -> Dataset[Item] | None:
        """Return the held-out pictures, or None if there is not one for every process."""
        count = len(held_out) if isinstance(held_out, Sized) else 0
        if held_out is None or count >= self.share.world_size:
            return held_out
        logger.warning(
            "%d held-out pictures are too few for %d processes: they are not used",
            *(count, self.share.world_size),
        )
        return None

    def _is_due(self, every: Steps | Epochs) -> bool:
        return self.step % counted(every) == 0 or self.done

    def _train_step(self, loader: Iterator[Item]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Make one optimizer step; return the gradient's norm and the metrics to report."""
        settings, data_step = self.config.optimizer, self.step + self.state.offset
        self.module.train()
        # All random numbers depend on the step alone: a resumed run needs no random state.
        torch.manual_seed(
            step_seed(self.run_config.seed, self.config.name, data_step, self.share.rank)
        )
        total_steps = counted(self.config.steps)
        first, length = self.objective.span(self.step, total_steps)
        rate = set_rates(self.optimizer, settings, self.step - first, length)
        self.comparable = self.objective.before_step(self.step, total_steps)
        total: dict[str, Tensor] = {}
        for index in range(self.share.accumulate):
            batch = self._batch(loader, data_step, index)
            last = index == self.share.accumulate - 1
            with accumulating(self.module, self.accelerator, last=last):
                with self.accelerator.autocast():
                    metrics = self.module(batch)
                self.accelerator.backward(metrics["loss"] / self.share.accumulate)
            for name, value in metrics.items():
                part = value.detach() / self.share.accumulate
                total[name] = total[name] + part if name in total else part
        parameters = [p for p in self.objective.trained.parameters() if p.requires_grad]
        norm = full(self.accelerator.clip_grad_norm_(parameters, settings.grad_clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        extra = self.objective.after_step(self.step)
        if self.state.average is not None:
            self.state.average.update(self.step)
        return norm, {**total, "grad_norm": norm, "lr": rate, **extra}

    def _batch(self, loader: Iterator[Item], data_step: int, micro_batch: int) -> Batch:
        """Return the next micro-batch on the device, with its samples' keys on the CPU."""
        batch: Batch = send_to_device(next(loader), self.accelerator.device, non_blocking=True)
        key = sample_keys(self.share, data_step, micro_batch, seed=self.run_config.seed)
        return {**batch, "key": key}

    def _check_norm(self, norm: Tensor | None) -> None:
        """Raise for a gradient that is not finite; every process sees the same norm."""
        if norm is None or self.accelerator.scaler is not None:  # a scaler skips such steps
            return
        if not math.isfinite(value := norm.item()):
            raise _WentWrong(f"the gradient's norm is {value}")

    def _report(self, progress: Progress, metrics: Mapping[str, Tensor | float]) -> None:
        """Report the numbers of the last step, averaged over the processes."""
        if isinstance(self.data, ShardStream):  # scaled so that the mean is the sum over processes
            count = self.data.num_left_out * self.share.world_size
            metrics = {**metrics, "left_out": float(count)}
        values = self._mean(metrics)
        if problem := self.state.guard.judge(values["loss"], spikes=self.comparable):
            raise _WentWrong(problem)
        if self.accelerator.device.type == "cuda":
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.tracker.scalars(
            self.step, progress.report(self.step, values, work=self.objective.work)
        )

    def _mean(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Return the means over all processes."""
        values = torch.tensor(
            [float(value) for value in metrics.values()], device=self.accelerator.device
        )
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        return dict(zip(metrics, values.tolist(), strict=True))

    @torch.no_grad()
    def _validate(self, progress: Progress) -> None:
        """Report the metrics on the held-out pictures, with the weights that would be published."""
        assert self.held_out is not None
        loader, share = validation_loader(self.held_out, self.share)
        keys = sample_keys(share, 0, 0, seed=0)
        self.module.eval()
        total: dict[str, float] = {}
        with self.averaged():
            for batch in batches(loader):
                placed = send_to_device(batch, self.accelerator.device)
                with self.accelerator.autocast():
                    metrics = self._mean(self.module({**placed, "key": keys}))
                total = {n: total.get(n, 0.0) + v / len(loader) for n, v in metrics.items()}
            shard_again(self.module)  # the next step needs its own weights
        values = {f"held_out_{name}": value for name, value in total.items()}
        self.held_out_loss = (self.step, total["loss"])
        progress.note(self.step, **values)
        self.tracker.scalars(self.step, values)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the trained modules until the block ends."""
        if self.state.average is None:
            yield
            return
        self.state.average.swap()
        try:
            yield
        finally:
            self.state.average.swap()

    @contextmanager
    def shipped(self) -> Iterator[None]:
        """Put the unsharded weights to publish into the modules; every process must enter it."""
        with self.averaged(), whole(self.module):
            yield

    def _write_samples(self) -> None:
        """Write a contact sheet made with the weights that would be published."""
        self.objective.eval()
        with self.shipped():
            pictures, titles = self.objective.samples(self.run_config.seed)
        path = self.folder / "samples" / f"step{self.step:06d}.png"

        def write() -> None:
            sheet = contact_sheet(pictures, titles)
            with write_file(path) as partial:
                sheet.save(partial, "PNG")
            self.tracker.images(self.step, "samples", sheet)

        on_main(self.accelerator, write)

    def save(self) -> None:
        """Save the step; every process must call this."""
        state = self.state.gather()
        on_main(
            self.accelerator,
            lambda: self.store.save(self.step, state, config=self.config, loss=self._loss()),
        )

    def _loss(self) -> float | None:
        """Return the loss that decides which step is the best.

        It is the loss of the held-out pictures, or the mean of the last reports if there are none.
        """
        if self.held_out is not None:
            step, loss = self.held_out_loss or (-1, 0.0)
            return loss if step == self.step else None
        recent = self.state.guard.memory[-10:]
        return sum(recent) / len(recent) if recent else None

    def _restore(self) -> bool:
        """Continue from the newest saved step; return whether there is one."""
        found = self.store.load()
        if found is None:
            return False
        saved, state = found
        free = {name: getattr(self.config, name) for name in FREE_OF_PHASE}
        if dataclasses.replace(saved.config, **free) != self.config:
            raise ConfigError(
                f"{saved.folder} belongs to a run with other settings; "
                "use the same preset or another --output-dir"
            )
        try:
            self.state.load(state)
        except ValueError as error:
            raise CheckpointError(
                f"{saved.state_file} does not fit this model ({error}); restore the file of this "
                "run, or delete the folder to start the phase again"
            ) from error
        return True

    def _roll_back(self, problem: str, progress: Progress) -> None:
        """Go back to the last saved step and skip the batches since then; see GuardConfig."""
        name, state, most = self.config.name, self.state, self.config.guard.max_rollbacks
        at, rollbacks = state.step, state.rollbacks + 1
        reached = at + state.offset + 1  # data steps seen
        problem = f"phase {name}, step {at}: {problem}"
        advice = f"lower the learning rate ({self.config.optimizer.lr:g}) and start again"
        if rollbacks > most:
            raise TrainingError(f"{problem}, after {most} rollbacks; {advice}")
        if not self._restore():
            raise TrainingError(f"{problem}, before the first saved step; {advice}")
        state.rollbacks, state.offset = rollbacks, reached - state.step
        logger.warning(
            "%s; going back to step %d and skipping the batches since (rollback %d of at most %d)",
            *(problem, state.step, rollbacks, most),
        )
        progress.note(at, rolled_back_to=state.step, because=problem)
        self.tracker.phase(name, state.step)

    def _check_space(self) -> None:
        """Raise before the first step when the disk has no space for the steps to be kept."""
        needed = saved_bytes(self.objective, self.config)
        existing = next(p for p in (self.folder, *self.folder.parents) if p.is_dir())
        needed -= self.store.num_bytes()  # a resumed run already has these
        if needed > (free := shutil.disk_usage(existing).free):
            raise ConfigError(
                f"phase {self.config.name}: saved steps need {needed / 2**30:.2f} GiB more, but "
                f"{existing} has {free / 2**30:.2f} GiB free; free some, or set keep_last below "
                f"{self.config.keep_last}"
            )


def share_of(config: PhaseConfig, accelerator: Accelerator) -> Share:
    """Return this process's part of every step's batch."""
    return Share(
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulate=config.accumulate,
    )
