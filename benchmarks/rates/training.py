"""What the trainer costs: its steps beside those of a plain PyTorch loop of the same model.

    nsp bench training [--preset emoji] [--phase predictor] [--steps 40] [--size L] [--uncached]

Both train the same phase on the same batches with the same optimizer, in one process, a step each
in turn. The trainer's include its sampler, checks, reports and averages, not saving and samples,
which happen once in hundreds of steps.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.benchmarks.record.doubts import busy
from nsp.benchmarks.record.environment import OtherWork
from nsp.config import Config
from nsp.family.objective import Objective, TokenCache, TrainingData
from nsp.family.recipe import PhaseConfig, RunConfig, counted
from nsp.family.recipes import preset as named_run
from nsp.family.registry import family
from nsp.text.parts import TextEncoderSettings
from nsp.training.data_order import Share, StepSampler, sample_keys
from nsp.training.optimizer import new_optimizer, set_rates
from nsp.training.progress import Progress
from nsp.training.run_pictures import open_pictures
from nsp.training.stopping import StopRequest
from nsp.training.tracking import Tracker
from nsp.training.trainer import Phase
from nsp.training.whole_run import resolve_precision
from nsp.values import choice

GOAL = 0.03
WARMUP = 2  # steps of each that are not counted


@dataclass(frozen=True, kw_only=True)
class PhaseTimes(Config):
    """The steps of one phase by the trainer and by a plain loop, in turn."""

    phase: str
    batch_size: int
    threads: int
    device: str
    step_ms: dict[str, tuple[float, ...]]  # "trainer" and "plain"
    ratio_median: float  # of neighbours
    goal: float
    trusted: bool
    warnings: tuple[str, ...]  # why not
    size: str | None = None  # named model; None: the preset's
    flops_per_image: float = 0.0  # forward and backward
    memory_gib: float | None = None  # most of a GPU that both together held; None on a processor

    @property
    def overhead(self) -> float:
        """The share that the trainer takes beyond a plain step."""
        return self.ratio_median - 1

    @property
    def words(self) -> str:
        """One line for people; the ratio only of a run that is trusted."""
        medians = {name: statistics.median(times) for name, times in self.step_ms.items()}
        name = self.phase if self.size is None else f"{self.size}, {self.phase}"
        rate = 1e3 * self.batch_size / medians["trainer"]
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.1f} GiB for both"
        times = (
            f"{name}: trainer {medians['trainer']:.1f} ms, plain loop "
            f"{medians['plain']:.1f} ms a step of {self.batch_size} pictures ({rate:.3g} images/s, "
            f"{1e-12 * self.flops_per_image * rate:.3g} TFLOP/s{memory}); "
        )
        if not self.trusted:
            return f"{times}no ratio, because this run is not trusted: {'; '.join(self.warnings)}"
        return (
            f"{times}{100 * self.overhead:+.1f} % (median ratio of neighbours; goal: "
            f"{100 * self.goal:.0f} %)"
        )


class _Enough(Exception):
    """All steps are measured."""


def plain_loop(
    objective: Objective, config: PhaseConfig, seed: int, accelerator: Accelerator
) -> Iterator[None]:
    """Make a step each time it is asked, as one writes them by hand, in the same precision."""
    optimizer = new_optimizer(objective, config.optimizer)
    parameters = [p for p in objective.trained.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    for step, batch in enumerate(_batches(objective, config, seed)):
        objective.train()
        set_rates(optimizer, config.optimizer, step, counted(config.steps))
        with accelerator.autocast():
            loss = objective(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(step)
        if config.ema_decay:
            live = [p.detach() for p in parameters]
            torch._foreach_lerp_(average, live, 1 - config.ema_decay)
        yield


def interleaved(
    phase: Phase, plain: Iterator[None], accelerator: Accelerator, *, steps: int
) -> dict[str, list[float]]:
    """Return the seconds of each step of both; a plain one follows each of the trainer's."""
    times: dict[str, list[float]] = {"trainer": [], "plain": []}
    marked = 0.0
    advance = Progress.advance

    def measured(self: Progress, step: int) -> None:
        nonlocal marked
        advance(self, step)
        now = time.perf_counter()
        if step > WARMUP:
            times["trainer"].append(now - marked)
        if len(times["trainer"]) == steps:
            raise _Enough
        next(plain)
        marked = time.perf_counter()
        if step > WARMUP:
            times["plain"].append(marked - now)

    Progress.advance = measured  # type: ignore[method-assign]
    try:
        with StopRequest(accelerator) as stop:
            phase.run(stop)
    except _Enough:
        return {name: seconds[: steps - 1] for name, seconds in times.items()}
    finally:
        Progress.advance = advance  # type: ignore[method-assign]
    raise AssertionError("the phase ended early")


def _batches(objective: Objective, config: PhaseConfig, seed: int) -> Iterator[Mapping[str, Any]]:
    data: Any = objective.dataset()
    share = Share(batch_size=config.batch_size)
    sampler = StepSampler(len(data), share, start=0, stop=counted(config.steps), seed=seed)
    indices = [[index for _, index in batch] for batch in sampler]
    for step, batch in enumerate(DataLoader(data, batch_sampler=indices)):
        yield {**batch, "key": sample_keys(share, step, 0, seed=seed)}


def measure(
    run: RunConfig, config: PhaseConfig, *, steps: int, size: str | None = None
) -> PhaseTimes:
    """Return the times of both, from one interleaved run; `size` is the model's name."""
    other_work = OtherWork()
    with tempfile.TemporaryDirectory() as folder:
        pictures = open_pictures(run.data, skip_bad_files=False)
        start = Path(folder) / "start"
        record = family(run.family)
        new = record.learner.new_system(
            record.config.from_dict(run.model),
            TextEncoderSettings.from_dict(run.text_encoder),
            pictures.source,
        )
        save_checkpoint(start, new, notes={}, sampling={})
        cache = TokenCache(Path(folder) / "tokens.safetensors")
        on_cpu = not torch.accelerator.is_available()
        precision = resolve_precision(run.precision, on_cpu=on_cpu)
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def objective() -> Objective:
            system = read_checkpoint(start).load()
            data = pictures.to_train(
                system.config.image_size_px, run, Share(batch_size=config.batch_size)
            )
            made: Objective = record.learner.objective(
                config.name, config.objective, system, TrainingData(data, cache=cache)
            )
            return made.to(accelerator.device)

        tracker = Tracker(run.tracking)
        tracker.start(run.to_dict(), Path(folder))
        phase = Phase(config, objective(), accelerator, Path(folder) / "phase", run, tracker)
        plain = plain_loop(objective(), config, run.seed, accelerator)
        times = interleaved(phase, plain, accelerator, steps=steps)
        tracker.close("finished")
        memory = None
        if accelerator.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
    ratios = [a / b for a, b in zip(times["trainer"], times["plain"], strict=True)]
    doubted = tuple(busy(other_work.cores(), os.cpu_count() or 1))
    return PhaseTimes(
        phase=config.name,
        batch_size=config.batch_size,
        threads=torch.get_num_threads(),
        device=str(accelerator.device),
        step_ms={name: tuple(1e3 * s for s in seconds) for name, seconds in times.items()},
        ratio_median=statistics.median(ratios),
        goal=GOAL,
        trusted=not doubted,
        warnings=doubted,
        size=size,
        flops_per_image=phase.flops,
        memory_gib=memory,
    )


def measure_phases(
    preset: str,
    phases: tuple[str, ...],
    *,
    steps: int,
    sizes: tuple[str, ...] = (),
    batch_size: int | None = None,
    uncached: bool = False,
) -> Iterator[PhaseTimes]:
    """Yield the times of every phase of a named run, or of those asked for.

    With `sizes`, named models take the place of the run's. With `uncached`, pictures are mirrored
    at random, so that an image tokenizer reads them in every step.
    """
    run = named_run(preset)
    known = family(run.family).sizes
    if uncached:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, flip=True))
    for size in sizes or (None,):
        if size is not None:
            model = known[choice(f"size of family {run.family}", size, known)].to_dict()
            run = dataclasses.replace(run, model=model)
        for config in run.phases:
            if phases and config.name not in phases:
                continue
            # Long enough that nothing but steps happens; reports as usual.
            config = dataclasses.replace(
                config,
                steps=10**6,
                batch_size=batch_size or config.batch_size,
                sample_every=10**6,
                checkpoint_every=10**6,
                validate_every=10**6,
            )
            yield measure(run, config, steps=steps, size=size)
