"""Small models of the raster families, of captions or prompts, and what their engines must keep."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.artifacts.systems import save_checkpoint
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import Trace
from nsp.raster.raster_learner import untrained_source
from nsp.text.parts import TextEncoderSettings

FAMILIES = ("next_patch", "latent_gpt")
PROMPTS = ["apple", "cat"]
_NOISE = 0.05  # added to every weight of the transformer: fresh ones give nearly equal logits
NUM_ROUNDS = 3  # of a recording: run, captured, replayed


def small_system(name: str, *, depth: int = 2, grid_side: int = 4) -> Any:
    """Return a model of the tiny size in this depth and on this grid, whose weights all matter."""
    record = family(name)
    tiny = record.sizes["tiny"]
    config = dataclasses.replace(
        tiny,
        gpt=dataclasses.replace(tiny.gpt, depth=depth),
        vq=dataclasses.replace(tiny.vq, channel_multipliers=(1,)),  # tracing takes time
        grid_side=grid_side,
    )
    torch.manual_seed(0)
    text_encoder = TextEncoderSettings(vocab_size=560, depth=1, num_heads=2)
    system = record.learner.new_system(config, text_encoder, untrained_source())
    with torch.no_grad():
        for parameter in system.gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * _NOISE)
    return system.eval()


def small_checkpoint(folder: Path, name: str, *, depth: int = 2, grid_side: int = 4) -> Path:
    """Write such a model to `folder` and return it."""
    save_checkpoint(folder, small_system(name, depth=depth, grid_side=grid_side), notes={})
    return folder


def traced(pipe: Pipeline, *, seed: int, **settings: Any) -> Trace:
    request = {"prompts": PROMPTS, "guidance_scale": 2.0, **settings}
    trace = pipe.generate(**request, seed=seed, trace=True).trace
    assert trace is not None
    return trace


def codes_of(trace: Trace) -> NDArray[np.int64]:
    """Return the codes (B, N) that were drawn."""
    return np.concatenate(trace.tokens, axis=1)


def assert_same_codes(found: Pipeline, expected: Pipeline) -> None:
    """Each draws for itself: run, captured, replayed; guided at first, then not; and filtered."""
    for settings in ({"cfg_interval": 3}, {"guidance_scale": 1.0, "top_p": 0.9, "top_k": 8}):
        for seed in range(NUM_ROUNDS):
            ours, theirs = (codes_of(traced(p, seed=seed, **settings)) for p in (found, expected))
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{settings}, seed {seed}")


def agreement(found: Pipeline, expected: Pipeline, *, num_seeds: int = 16) -> float:
    """Return the share of equal codes where both go on with those of `expected`."""
    equal = []
    for seed in range(num_seeds):
        codes = codes_of(traced(expected, seed=seed))
        equal.append(codes_of(traced(found, seed=seed, forced_tokens=codes)) == codes)
    return float(np.mean(equal))


def assert_graphs_of_rows_replay(pipe: Pipeline) -> None:
    """A picture is a graph for every row of codes, and replayed it is what a plain run makes."""
    rows: list[list[tuple[Any, ...]]] = []
    for _ in range(NUM_ROUNDS):
        steps = list(pipe.stream(prompts=PROMPTS, seed=7, guidance_scale=2.0))
        assert len(steps) == pipe.config.grid_side
        rows.append([(step.tokens, step.logits, step.latent) for step in steps])
    recording = pipe.backend._recorder._recordings[-1]  # the one used last
    assert recording._graphs is not None, "not recorded as CUDA graphs"
    assert len(recording._graphs) == pipe.config.grid_side
    for again in rows[1:]:
        for plain, found in zip(rows[0], again, strict=True):
            for before, after in zip(plain, found, strict=True):
                np.testing.assert_array_equal(before, after)
