"""A whole training run: data, model, phases in order, a checkpoint folder at the end."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.errors import CheckpointError, ConfigError
from nsp.families.registry import family
from nsp.files import write_file
from nsp.training.config import RunConfig
from nsp.training.trainer import Phase, shipped_weights

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint"


@dataclass(frozen=True)
class RunResult:
    """Where a run left its results."""

    checkpoint: Path
    finished: bool  # False after Ctrl-C


def resolve_precision(requested: str) -> str:
    """Return accelerate's word for a precision; "auto" is bf16 on a GPU that has it, else fp32."""
    if requested == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        requested = "bf16" if has_bf16 else "fp32"
    if requested == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision fp16 needs a CUDA device; use fp32 or bf16")
    return "no" if requested == "fp32" else requested


def train(
    config: RunConfig,
    folder: Path,
    *,
    last_phase: str | None = None,
    resume: bool = False,
    skip_bad_files: bool = False,
) -> RunResult:
    """Train every phase of `config` up to `last_phase` in `folder` and write `folder`/checkpoint.

    Ctrl-C ends the run early with a checkpoint of what has been learnt; `resume` continues such a
    run (or any that died) at its last saved step. Raises ConfigError when `folder` holds a run and
    `resume` is not given.
    """
    names = [phase.name for phase in config.phases]
    if last_phase is not None and last_phase not in names:
        raise ConfigError(f"unknown phase {last_phase!r} of this run; known: {', '.join(names)}")
    accelerator = Accelerator(mixed_precision=resolve_precision(config.precision))
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes: this version trains in one; start one process"
        )
    stored = _run_file(folder, resume=resume)
    set_seed(config.seed)
    record = family(config.family)
    source = open_source(config.data.source, split="train", skip_bad_files=skip_bad_files)
    system = record.get("system")(config.model, config.text_encoder, source).to(accelerator.device)
    data = ImageDataset(
        source,
        system.config.image_size_px,
        train=True,
        crop=config.data.crop,
        flip=config.data.flip,
        seed=config.seed,
    )
    with write_file(stored) as partial:  # from here on the folder belongs to this run
        partial.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    logger.info(
        "%s on %s (%s): %d pictures, run folder %s",
        config.family,
        accelerator.device,
        accelerator.mixed_precision,
        len(data),
        folder,
    )
    finished, steps = True, {}
    for phase_config in config.phases:
        objective = record.get("objective")(phase_config.name, phase_config.objective, system, data)
        phase = Phase(
            phase_config,
            objective,
            accelerator,
            folder / phase_config.name,
            config.seed,
            config.data.num_workers,
        )
        if not phase.done:
            try:
                phase.run()
            except KeyboardInterrupt:
                finished = False
        steps[phase_config.name] = phase.step
        with shipped_weights(phase):
            _save(folder, system, config, steps)
        if phase.done:
            phase.adopt_average()
        if not finished or phase_config.name == last_phase:
            break
    return RunResult(folder / CHECKPOINT_NAME, finished)


def _save(folder: Path, system: torch.nn.Module, config: RunConfig, steps: dict[str, int]) -> None:
    """Write the checkpoint folder."""
    notes = {"steps": steps, "run": config.to_dict()}
    family(config.family).get("save_checkpoint")(
        folder / CHECKPOINT_NAME, system, notes=notes, sampling=config.sampling
    )


def _run_file(folder: Path, *, resume: bool) -> Path:
    """Return the path of the run's configuration; raise when it should (not) be there yet."""
    path = folder / "run.json"
    if path.exists() and not resume:
        raise ConfigError(
            f"{folder} holds a run already; continue it with --resume or choose --output-dir"
        )
    if resume and not path.exists():
        raise CheckpointError(f"{folder} holds no run to resume; leave --resume out to start one")
    return path
