"""What ending guidance after fewer scales saves, and what it does to the pictures.

The last scales hold most tokens, and without guidance they cost half.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.benchmarks.contest.parity import psnr_db
from nsp.benchmarks.contest.rounds import Runner, interleaved
from nsp.benchmarks.record.result import GuidancePoint
from nsp.benchmarks.record.times import measured_times
from nsp.pipeline.pipeline import Pipeline

LAST_SCALES = 4  # at most so many go without guidance
NUM_PICTURES = 8
_AT_ONCE = 4

Conditions = Callable[[int], Mapping[str, Sequence[Any]]]  # count -> what `generate` takes


def guidance_sweep(
    pipeline: Pipeline, conditions: Conditions, *, rounds: int, seconds: float, seed: int
) -> Iterator[GuidancePoint]:
    """Yield a point for guidance on all scales, then for ever fewer; none for a model without it.

    Only families whose guidance can end early have the setting `guidance_until`.

    Times are of single images, all settings in the same rounds; pictures are made from the same
    conditions and seed, each setting with its own tokens.
    """
    settings = pipeline.sampling.to_dict()
    if "guidance_until" not in settings or settings["guidance_scale"] == 1:
        return
    one: dict[str, Any] = {**conditions(1), "seed": seed}
    count = [*pipeline.stream(**one)][-1].num_scales
    fewest = max(0, count - LAST_SCALES)
    guided = {until: _guided(pipeline, until) for until in range(count, fewest - 1, -1)}
    observations = list(
        interleaved(
            [Runner(str(until), each) for until, each in guided.items()],
            one,
            rounds=rounds,
            warmup=1,
            max_seconds=seconds,
        )
    )
    expected_tokens, expected = _pictures(guided[count], conditions, seed)
    for until, each in guided.items():
        tokens, found = _pictures(each, conditions, seed)
        yield GuidancePoint(
            guided_scales=until,
            times_ms=tuple(measured_times(observations, str(until))),
            token_agreement=float(np.mean(expected_tokens == tokens)),
            psnr_db=tuple(psnr_db(a, b) for a, b in zip(expected, found, strict=True)),
        )


def _guided(pipeline: Pipeline, until: int) -> Pipeline:
    """Return a copy whose guidance ends after `until` scales."""
    result = copy(pipeline)
    result.sampling = pipeline.sampling.changed({"guidance_until": until})
    return result


def _pictures(
    pipeline: Pipeline, conditions: Conditions, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the tokens (N, L of all scales) and the pictures (N, 3, H, W) in [0, 1]."""
    ((key, values),) = conditions(NUM_PICTURES).items()
    size = min(_AT_ONCE, pipeline.max_batch or _AT_ONCE)
    tokens, images = [], []
    for start in range(0, len(values), size):
        request: dict[str, Any] = {key: values[start : start + size], "seed": seed}
        steps = []
        for step in pipeline.stream(**request):
            steps.append(step.tokens)
        tokens.append(np.concatenate(steps, axis=1))
        images.append(step.decode())
    return np.concatenate(tokens), np.concatenate(images)
