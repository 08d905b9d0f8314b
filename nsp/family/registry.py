"""The registry of model families: one plain record each; what it names is imported when used."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nsp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its rooms, as "module:name"; the first three import no torch."""

    name: str
    config: str  # Config record of the model
    stages_io: str  # (config, kv_layout, float dtype) -> {stage name: StageIO}
    request: str  # record of one batch
    request_arrays: str  # (config, sampling, seed, batch, given) -> its arrays: random numbers
    loop_inputs: str  # (config, request) -> {name: array} for the loop
    loop: str  # generator over scale steps: (backend, config, uploaded inputs)
    system: str  # torch: new_system(run config, source) -> module with all weights
    objective: str  # torch: (phase name, settings, system, data, held out, cache) -> Objective
    reconstruct: str  # torch: (system, pictures (B,H,W,3) uint8) -> them, through the tokenizer
    cache: str  # torch: (system, data, file): what the tokenizer makes of the data
    stages: str  # torch: (system, kv_layout) -> {stage name: module}
    load_checkpoint: str  # torch: (folder, config dict) -> system
    save_checkpoint: str  # torch: (folder, system, notes, sampling)
    precision: str  # (config) -> {stage name: StageWeights}; no torch, as all that follow
    trace_sizes: str  # sizes of the free axes to trace stages with
    profiles: str  # (config, batch and ranks) -> {stage name: sizes of every engine profile}
    parity_requests: str  # (config) -> arguments of Pipeline.generate that call every stage
    convert: str | None = None  # torch: published weights -> checkpoint folder
    draws_tokens: bool = True  # from a codebook, which `nsp bench` compares
    train_options: str | None = None  # (run, options, steps of a phase) -> run, as asked for
    scale_of: str | None = None  # (config, sizes asked for) -> the scale that has them
    default_prompt: str | None = None  # of `nsp generate`
    default_seed: int = 0
    default_batch_size: int | None = None  # None: as many as are made best at once
    takes_no_prompt: bool = False  # "" stands for no prompt
    kv_layouts: tuple[str, ...] = ("delta", "present")  # of its cache
    # What of a configuration follows from the parts a model was trained with, such as its encoder.
    fields_of_parts: tuple[str, ...] = ("condition.",)

    def get(self, room: str) -> Any:
        """Return the object a field names, importing its module now."""
        module, _, name = getattr(self, room).partition(":")
        return getattr(importlib.import_module(module), name)


_VAR = "nsp.families.var"
_NEXT_SCALE = "nsp.families.next_scale"

FAMILIES: Mapping[str, Family] = {
    "var": Family(
        name="var",
        config=f"{_VAR}.config:VarConfig",
        stages_io=f"{_VAR}.io:stages_io",
        request=f"{_VAR}.loop:Request",
        request_arrays=f"{_VAR}.requests:request_arrays",
        loop_inputs=f"{_VAR}.loop:loop_inputs",
        loop=f"{_VAR}.loop:generate",
        system=f"{_VAR}.training:new_system",
        objective=f"{_VAR}.training:objective",
        reconstruct=f"{_VAR}.sampling:reconstruct",
        cache=f"{_VAR}.training:write_cache",
        stages=f"{_VAR}.stages:build_stages",
        load_checkpoint=f"{_VAR}.checkpoint:load_checkpoint",
        save_checkpoint=f"{_VAR}.checkpoint:save_checkpoint",
        convert=f"{_VAR}.published:convert",
        precision=f"{_VAR}.precision:stage_weights",
        trace_sizes=f"{_VAR}.profiles:TRACE_SIZES",
        profiles=f"{_VAR}.profiles:stage_profiles",
        parity_requests=f"{_VAR}.profiles:parity_requests",
    ),
    "next_scale": Family(
        name="next_scale",
        config=f"{_NEXT_SCALE}.config:NextScaleConfig",
        stages_io=f"{_NEXT_SCALE}.io:stages_io",
        request=f"{_NEXT_SCALE}.loop:Request",
        request_arrays=f"{_NEXT_SCALE}.requests:request_arrays",
        loop_inputs=f"{_NEXT_SCALE}.loop:loop_inputs",
        loop=f"{_NEXT_SCALE}.loop:generate",
        system=f"{_NEXT_SCALE}.training:new_system",
        objective=f"{_NEXT_SCALE}.training:objective",
        reconstruct=f"{_NEXT_SCALE}.sampling:reconstruct",
        cache=f"{_NEXT_SCALE}.training:write_cache",
        stages=f"{_NEXT_SCALE}.stages:build_stages",
        load_checkpoint=f"{_NEXT_SCALE}.checkpoint:load_checkpoint",
        save_checkpoint=f"{_NEXT_SCALE}.checkpoint:save_checkpoint",
        precision=f"{_NEXT_SCALE}.precision:stage_weights",
        trace_sizes=f"{_NEXT_SCALE}.profiles:TRACE_SIZES",
        profiles=f"{_NEXT_SCALE}.profiles:stage_profiles",
        parity_requests=f"{_NEXT_SCALE}.profiles:parity_requests",
        draws_tokens=False,
        fields_of_parts=("vae.", "text.", "pretrained_vae"),
        train_options=f"{_NEXT_SCALE}.presets:with_options",
        scale_of=f"{_NEXT_SCALE}.config:scale_of",
        default_prompt="a beautiful landscape with mountains and a lake",
        default_seed=42,
        default_batch_size=1,
        takes_no_prompt=True,
        kv_layouts=("delta",),
    ),
}


def family(name: str) -> Family:
    """Return the record of a family; raise ConfigError naming the known ones."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
