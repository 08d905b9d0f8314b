"""Finds state dicts in wrappers, removes prefixes, and recognizes models by tensor names."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsp.errors import CheckpointError

log = logging.getLogger(__name__)

# Keys under which training scripts keep the weights.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "params", "weights")
_TRAINER = "trainer"  # public VAR code: {"trainer": {"var_wo_ddp": ..., "vae_local": ...}}
# Prefixes that DistributedDataParallel, torch.compile and training classes add to every name ...
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
# ... and words that wrappers of a model's parts insert into names; no layer has such a name.
_INSIDE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = "n_averaged"  # counter of torch.optim.swa_utils.AveragedModel next to its module.*
_MAX_DEPTH = 8
_NUM_SHOWN = 5
_MAX_DIGITS = 6  # digits of a number in a tensor's name
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\b")

VAR_TOKENIZER = "the image tokenizer of VAR"
VAR_PREDICTOR = "the transformer of VAR (the predictor)"
# Names that show which model a state dict belongs to; every pattern of a row must be found.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "an adapter (LoRA or PEFT), which changes a model but is not a model; merge it into its "
        "model and save that",
        (r"(^|\.)(lora_(A|B|up|down|embedding_[AB])|lora|hada_w\d_[ab]|ia3_l)(\.|_|$)",),
    ),
    (VAR_TOKENIZER, (r"^quantize\.embedding\.weight$", r"^(en|de)coder\.")),
    (VAR_PREDICTOR, (r"^word_embed\.|^lvl_embed\.|^head_nm\.",)),
    ("an AutoencoderKL of diffusers", (r"^decoder\.up_blocks\.",)),
    ("a diffusion U-Net", (r"^(down_blocks|up_blocks|mid_block)\.",)),
    ("a whole Stable Diffusion model", (r"^model\.diffusion_model\.|^first_stage_model\.",)),
    ("a CLIP text encoder", (r"^(text_model\.)?embeddings\.token_embedding\.",)),
    ("an optimizer", (r"^(param_groups|state)(\.|$)",)),
)


@dataclass(frozen=True)
class FoundState:
    """A state dict and its place in the file."""

    state: dict[str, Tensor]
    where: str  # keys that lead to it, "" for the file itself


def find_state(content: Any, path: Path, *, part: str = "") -> dict[str, Tensor]:
    """Return the state dict in a file's content, with plain names.

    It is searched in the wrappers above and, as in the public trainer, under ['trainer'][part]. If
    there are weights and their moving average, the weights are used, which is logged. Prefixes that
    all names share are removed. Raises CheckpointError naming the existing keys.
    """
    found, averages = _descend(content, part, "", _MAX_DEPTH)
    if len(found) > 1 or (not found and len(averages) > 1):
        held = " and ".join(each.where for each in (found or averages))
        raise CheckpointError(f"{path} has weights under {held}; save only the ones you want")
    if not found and not averages:
        raise CheckpointError(f"{path} {_no_state(content, part)}")
    (chosen,) = found or averages
    if chosen.where and found and averages:
        beside = ", ".join(each.where for each in averages)
        log.warning(
            "%s: using the weights under %s; their moving average is under %s, save only that "
            "to use it",
            path,
            chosen.where,
            beside,
        )
    elif not found:
        log.warning("%s has only a moving average of weights: using %s", path, chosen.where)
    elif chosen.where:
        log.info("%s: using the weights under %s", path, chosen.where)
    return plain_names(chosen.state, path)


def _is_average(key: str) -> bool:
    return bool(re.search(r"(^|_)(ema|swa|averaged?|shadow)(_|$)", key))


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())
    )


def _descend(
    value: Any, part: str, where: str, depth: int
) -> tuple[list[FoundState], list[FoundState]]:
    """Return the state dicts inside: those of the model and those of its moving averages."""
    if _is_state(value):
        return [FoundState(dict(value), where)], []
    if not isinstance(value, Mapping) or not depth:
        return [], []
    if part and part in value:
        keys = [part]
    elif isinstance(value.get(_TRAINER), Mapping):
        keys = [_TRAINER]
    else:
        keys = [key for key in value if key in WRAPPERS]
    found: list[FoundState] = []
    averages: list[FoundState] = []
    for key in keys:
        inside, averaged = _descend(value[key], part, _joined(where, key), depth - 1)
        found += inside
        averages += averaged
    for key in (key for key in value if isinstance(key, str) and _is_average(key)):
        inside, averaged = _descend(value[key], part, _joined(where, key), depth - 1)
        inside = inside or _shadow(value[key], _joined(where, key))
        averages += inside + averaged
    return found, averages


def _shadow(value: Any, where: str) -> list[FoundState]:
    """Return the weights that an averaging class keeps next to its own numbers."""
    if isinstance(value, Mapping):
        for key in ("shadow", "shadow_params", "ema"):
            if _is_state(value.get(key)):
                return [FoundState(dict(value[key]), _joined(where, key))]
    return []


def _joined(where: str, key: str) -> str:
    return f"{where}/{key}" if where else key


def _no_state(content: Any, part: str) -> str:
    """Return, as text after the file's name, what it has instead of a state dict."""
    nested = f", also not under {', '.join(WRAPPERS)} or trainer/{part}" if part else ""
    said = f"does not contain a state dict (names to tensors){nested}"
    if not isinstance(content, Mapping):
        return f"{said}; it contains a {type(content).__name__}"
    if not content:
        return f"{said}; it is empty"
    inner = [str(key) for key, value in content.items() if _is_state(value)]
    if inner:
        return f"{said}; state dicts are under {_some(inner)}, save only the one you want"
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if odd and len(odd) < len(content):
        return f"{said}; these are not tensors: {_some(odd)}"
    return f"{said}; its keys are {_some(map(str, content))}"


def _some(names: Iterable[str]) -> str:
    """Return the first names of many in words."""
    listed = list(names)
    more = f" and {len(listed) - _NUM_SHOWN} more" if len(listed) > _NUM_SHOWN else ""
    return ", ".join(listed[:_NUM_SHOWN]) + more


def plain_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return tensors with the model's own names.

    Prefixes are removed as long as all names share one, and so are the words that torch.compile and
    FSDP insert. Raises CheckpointError if two names become one.
    """
    named = dict(state)
    others = [name for name in named if name != _AVERAGED]
    if len(others) < len(named) and others and all(n.startswith("module.") for n in others):
        log.warning("%s has a moving average of weights (swa_utils), which is used", path)
        del named[_AVERAGED]
    named = _without_averages(named, path)
    plain = {_INSIDE.sub("", name): tensor for name, tensor in named.items()}
    if len(plain) != len(named):
        raise CheckpointError(
            f"{path} has tensors with compiled and with plain names; keep one kind"
        )
    while prefix := _shared_prefix(plain):
        plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return plain


def _without_averages(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights of one state dict that also has their moving average.

    The first parts of names distinguish them (`model.`, `model_ema.`); this is logged.
    """
    averages = sorted({first for name in state if _is_average(first := name.partition(".")[0])})
    weights = {n: t for n, t in state.items() if n.partition(".")[0] not in averages}
    if not averages or not (prefix := _shared_prefix(weights)):
        return dict(state)
    log.warning(
        "%s: using the weights under %s; their moving average is under %s, save only that to use "
        "it",
        path,
        prefix.rstrip("."),
        ", ".join(averages),
    )
    return weights


def _shared_prefix(names: Collection[str]) -> str:
    """Return the prefix that all names begin with and continue after; "" if there is none."""
    for prefix in _PREFIXES:
        if names and all(n.startswith(prefix) and n != prefix for n in names):
            return prefix
    return ""


def kind_of(names: Collection[str]) -> str | None:
    """Return the kind of model with such names in words; None if it is unknown."""
    for words, patterns in _KINDS:
        if all(any(re.search(pattern, name) for name in names) for pattern in patterns):
            return words
    return None


def part_of_a_model(path: Path) -> str:
    """Return text after a file's name saying that it is one of several parts; "" if it is not."""
    if not (shard := _SHARD.search(path.name)) or int(shard[2]) < 2:
        return ""
    return (
        f"is part {int(shard[1])} of {int(shard[2])} of a model; give its index "
        "(*.safetensors.index.json), or save the model in one file"
    )


def what_it_is(path: Path, names: Collection[str]) -> str:
    """Return what a file of tensors with `names` is, as text after its name in an error."""
    if shard := part_of_a_model(path):
        return shard
    if (kind := kind_of(names)) is not None:
        return f"holds {kind}"
    if not names:
        return "has no tensors"
    return f"has {len(names)} tensors of another kind of model: {_some(sorted(names))}"


def shape_of(state: Mapping[str, Tensor], name: str, num_axes: int) -> torch.Size:
    """Return the shape of a required tensor, which must have that many axes and not be empty."""
    if name not in state:
        raise CheckpointError(f"missing tensor {name}")
    shape = state[name].shape
    if len(shape) != num_axes or 0 in shape:
        raise CheckpointError(f"misshapen tensor {name} {tuple(shape)}")
    return shape


def count_of(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest index `pattern` captures; 0 without a match."""
    found = {match[1] for name in state if (match := re.match(pattern, name))}
    if any(len(number) > _MAX_DIGITS for number in found):
        longest = max(found, key=len)
        raise CheckpointError(f"a tensor's name has the number {longest}, which no model has")
    return max((int(number) + 1 for number in found), default=0)
