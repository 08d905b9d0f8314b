"""Prepares an objective for its devices: adapters, checkpointing, compilation, sharding, DDP.

All of these work on the objective's `units`, its repeated parts (transformer blocks).
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from nsp.errors import ConfigError, NspError, TrainingError
from nsp.family.objective import Objective
from nsp.family.recipe import RunConfig

logger = logging.getLogger(__name__)

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def prepare(objective: Objective, config: RunConfig, accelerator: Accelerator) -> nn.Module:
    """Return the callable for batches; the objective's modules are changed in place.

    The objective is on its device. Call it before the optimizer is made: sharding replaces the
    parameters. FSDP is torch's
    `fully_shard` (FSDP2) called directly, because accelerate offers it on accelerators only and
    the same path must run on processors, where it is tested.
    """
    if config.compile:
        logger.info("torch.compile: the first steps are slow, for the model is compiled in them")
    for unit in objective.units():
        if config.activation_checkpointing:
            _checkpoint_activations(unit)
        if config.compile:
            unit.compile()
    if accelerator.num_processes == 1:
        return objective
    if config.parallel == "fsdp":
        if accelerator.mixed_precision == "fp16":
            raise ConfigError("fsdp does not scale fp16 losses; use --precision bf16")
        if any(phase.lora is not None for phase in config.phases):
            raise ConfigError("adapters (lora) are not sharded: they are small; use ddp")
        mesh = torch.distributed.device_mesh.init_device_mesh(
            accelerator.device.type, (accelerator.num_processes,)
        )
        # This warning, given every step, is about writing to a module's output. We never do that.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for unit in objective.units():
            fully_shard(unit, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective
    prepared: nn.Module = accelerator.prepare_model(objective)
    return prepared


def _checkpoint_activations(unit: nn.Module) -> None:
    """Make the unit recompute its activations in the backward pass instead of keeping them."""
    forward = unit.forward

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    unit.forward = recomputed


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather all parameters of a sharded module on every process, for reading.

    They stay when a part has been called: what is generated also reads weights outside of a part's
    own call. Every process must enter it, and make the same calls inside.
    """
    parts = _sharded(module)[1:]  # the outermost one keeps its own way
    for part in _sharded(module):
        part.unshard()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
        shard_again(module)


def shard_again(module: nn.Module) -> None:
    """Free the gathered parameters that a forward pass without a backward pass leaves behind.

    torch keeps those of the outermost module, and computes with them until a backward pass.
    """
    for part in _sharded(module):
        part.reshard()


def _sharded(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` on the first process while the others wait; if it fails, all processes end."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except (NspError, OSError) as caught:
            error = caught
    if accelerator.num_processes > 1:
        failed = torch.tensor(float(error is not None), device=accelerator.device)
        if accelerator.reduce(failed, reduction="sum").item() and error is None:
            raise TrainingError("the first process failed; its message says why")
    if error is not None:
        raise error


def gathered(module: nn.Module) -> dict[str, Any] | None:
    """Return the whole state dict of a sharded module on the CPU, None if it is not sharded.

    Every process must call it; the first one gets the tensors. (`whole` does not help here: the
    state dict of a sharded module always has the shards.)
    """
    if not any(isinstance(each, DTensor) for each in module.parameters()):
        return None
    return get_model_state_dict(module, options=GATHERED)


@contextmanager
def accumulating(module: nn.Module, accelerator: Accelerator, *, last: bool) -> Iterator[None]:
    """Leave the exchange of gradients to the last micro-batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(module):
            yield
