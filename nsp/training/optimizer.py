"""AdamW as the trainer uses it: parameter groups, learning rates, adapters."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.family.objective import Objective
from nsp.family.recipe import LoraConfig, OptimizerConfig, counted
from nsp.training.schedules import lr_ratio, weight_decay
from nsp.weights.adapters import save_adapter


def new_optimizer(objective: Objective, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, in one group with weight decay and one without."""
    named = [(n, p) for n, p in objective.trained.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if objective.decays(n, p) is decayed], "decayed": decayed}
        for decayed in (True, False)
    ]
    beta1, beta2 = config.betas
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=config.lr, betas=(beta1, beta2), fused=True)


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, steps: int
) -> float:
    """Set learning rate and weight decay of every group for `step`; return the learning rate."""
    ratio = lr_ratio(
        step,
        steps,
        kind=config.schedule,
        warmup_steps=counted(config.warmup_steps),
        warmup_start=config.warmup_start,
        end=config.final_ratio,
    )
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    decay = weight_decay(step, steps, start=config.weight_decay, end=end)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * ratio
        group["weight_decay"] = decay if group["decayed"] else 0.0
    return config.lr * ratio


def add_adapters(trained: nn.Module, config: LoraConfig) -> None:
    """Put adapters into the target layers of `trained`; from then on only these are trained."""
    import peft

    check_targets(trained, config)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    peft.inject_adapter_in_model(settings, trained)


def check_targets(trained: nn.Module, config: LoraConfig) -> None:
    """Raise ConfigError naming the linear layers of `trained` when a target is not among them."""
    linear = [name for name, module in trained.named_modules() if isinstance(module, nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"lora target {target!r} is not a linear layer of this phase; choose from: "
                f"{', '.join(known)}"
            )


def write_adapters(system: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Write the adapters in `system` as a folder for `nsp generate --lora`."""
    from peft.tuners.lora import LoraLayer

    layers, weights = dict[str, tuple[Tensor, Tensor]](), dict[str, Tensor]()
    for name, layer in system.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A
            parts = (f"{name}.lora_{part}.{adapter}.weight" for part in "AB")
            a, b = map(system.get_parameter, parts)
            layers[name] = a, b
            weights[name] = system.get_parameter(f"{name}.base_layer.weight")
    save_adapter(folder, layers, weights, rank=config.rank, alpha=config.alpha)


def merge_adapters(module: nn.Module) -> None:
    """Merge all adapters in `module` into the weights; names are as before `add_adapters`.

    Removing merged adapters again would round the weights: to continue training, merge a copy.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
