"""What a run needs and may not have, told before its first phase rather than in the middle."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.family.objective import Objective
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.family.registry import family
from nsp.family.system import System

logger = logging.getLogger(__name__)

# Below both, a step's memory is not worth the seconds that it takes to count.
_FEW_WEIGHTS = 16_000_000
_FEW_PIXELS = 2_000_000  # of a micro-batch
_GROUP = Path("/sys/fs/cgroup")


def check_classes(config: Any, kind: str, source: ImageSource | None) -> None:
    """Raise ConfigError for listed pictures of a class that a model of classes does not have.

    Pictures without a class are one warning: only some phases read the class.
    """
    if kind != "class" or source is None:
        return
    missing = sum(each.class_id is None for each in source.samples)
    if missing and config.num_classes > 1:
        logger.warning(
            "%d of %d pictures have no class, but this is a model of %d classes: phases that read "
            "the class will fail; give class folders, or a model of prompts",
            *(missing, len(source.samples), config.num_classes),
        )
    found = [each.class_id for each in source.samples if each.class_id is not None]
    if found and max(found) >= config.num_classes > 1:
        raise ConfigError(
            f"the pictures have {max(found) + 1} classes, but the model has {config.num_classes}; "
            f"set num_classes of its condition to {max(found) + 1}"
        )


def saved_bytes(objective: Objective, phase: PhaseConfig) -> int:
    """Return the bytes of all steps of a phase that are on the disk at once."""
    trained = list(objective.trained.parameters())
    total = sum(each.numel() * each.element_size() for each in trained)
    learnt = sum(each.numel() * 4 for each in trained if each.requires_grad)
    each_step = total + learnt * (2 + (phase.ema_decay > 0))
    return each_step * (phase.keep_last + 2)  # the best, and the one being written


def check_disk(needed: int, folder: Path) -> None:
    """Raise ConfigError where the saved steps of all phases together do not fit."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"the run's saved steps need {needed / 2**30:.2f} GiB, but {existing} has "
            f"{free / 2**30:.2f} GiB free; free some, lower keep_last, or give --checkpoint-dir on "
            "another disk"
        )


def warn_of_memory(
    run: RunConfig,
    phases: Sequence[PhaseConfig],
    system: System,
    objective_of: Callable[[PhaseConfig, System], Objective],
    *,
    batch_size_of: Callable[[PhaseConfig], int],
    device: torch.device,
) -> None:
    """Warn in one line of every phase whose step takes more memory than there is.

    It is no refusal: mixed precision, recomputed activations and sharding, which are not counted,
    take less.
    """
    size_px = system.config.image_size_px
    num_weights = sum(each.numel() for each in system.parameters())
    most_pixels = max(map(batch_size_of, phases)) * size_px**2
    if num_weights < _FEW_WEIGHTS and most_pixels < _FEW_PIXELS:
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nsp.artifacts.counting import emptied
    from nsp.training.memory_need import blank_batch, training_memory

    have, kind = free_memory(device), family(run.family).condition(system.config)
    for phase in phases:
        batch_size = batch_size_of(phase)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        need = training_memory(
            objective_of(phase, emptied(system, mode).requires_grad_(True)),
            batch=blank_batch(kind, size_px, batch_size),
            is_averaged=phase.ema_decay > 0,
            mode=mode,
        ).total
        if have is not None and need > have:
            logger.warning(
                "phase %s needs about %.1f GiB of memory with batches of %d, but %s has %.1f GiB; "
                "give a smaller --batch-size, or --activation-checkpointing",
                *(phase.name, need / 2**30, batch_size, device, have / 2**30),
            )


def free_memory(device: torch.device, *, group: Path = _GROUP) -> int | None:
    """Return the bytes that are free on a GPU, or on this machine; None if that is not known.

    A limit of the control group counts (version 2, that of this process in a container).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(n.split()[1]) for n in lines if n.startswith("MemAvailable:")]
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except OSError:  # another system, or no limit
        pass
    return min(found, default=None)
