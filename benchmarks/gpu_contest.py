"""One round of the GPU suite: a model size at a batch size, by everyone who can.

weights -> engines -> a fresh process each -> parity with float32 PyTorch -> interleaved rounds
"""

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.artifacts.manifest import PRECISION_DTYPES
from nsp.benchmarks import gpu_contestants as contestants
from nsp.benchmarks.ceilings.gpu import Clock, GpuCeilings
from nsp.benchmarks.contest.parity import compare
from nsp.benchmarks.contest.processes import run_child
from nsp.benchmarks.contest.rounds import StageCall
from nsp.benchmarks.gpu_contestants import EAGER, ENTRIES, REFERENCE, Place
from nsp.benchmarks.gpu_results import (
    DECODER,
    IMAGE,
    LOOP,
    Agreement,
    Contest,
    FreshProcess,
    GpuObservation,
    PartCost,
    part_cost,
    summary_rows,
)
from nsp.benchmarks.random_model import FAMILY, random_config, write_random_model
from nsp.benchmarks.record.result import Cost, call_costs
from nsp.cores import num_threads
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline
from nsp.stage.backend import Backend

logger = logging.getLogger(__name__)

_POLL_S = 0.01  # of the GPU's memory


def contest(
    size: str,
    place: Place,
    ceilings: GpuCeilings,
    *,
    only: Sequence[str],
    fresh_processes: bool,
    rounds: tuple[int, int],
) -> Contest:
    """Return what was measured of one size with one batch size.

    `rounds` are those to warm up and those that count. What cannot run here is left out, with the
    reason; nothing that one contestant raises ends the others.
    """
    config, batch = random_config(size), place.batch
    write_random_model(place.checkpoint, config)
    request: dict[str, Any] = {
        "class_ids": [i * config.num_classes // batch for i in range(batch)],
        "seed": 0,
    }
    ready: dict[str, Pipeline] = {}
    missing: dict[str, str] = {}
    fresh: dict[str, FreshProcess] = {}
    build_s: dict[str, float] = {}
    for name in only:
        logger.info("%s, batch %d: %s", size, batch, name)
        try:
            if (seconds := contestants.build(ENTRIES[name], place)) is not None:
                build_s[name] = seconds
            if fresh_processes:
                fresh[name] = fresh_process(name, place, request)
            pipeline = ENTRIES[name].load(place)
            pipeline.generate(**request)  # compiles, records, chooses kernels
            ready[name] = pipeline
        except Exception as error:  # torch, compilers and CUDA have no common class
            missing[name] = _reason(name, error)
    reference, parameters = contestants.reference(place)
    parity: dict[str, Agreement] = {}
    for name in tuple(ready):
        try:
            parity[name] = _agreement(reference, ready[name], request)
        except Exception as error:
            del ready[name]
            missing[name] = _reason(name, error)
    latent = [step.latent for step in reference.stream(**request)][-1]
    del reference
    contestants.free_memory()
    observations = tuple(_observe(ready, request, latent, Clock(place.device), rounds))
    costs = part_costs(config, batch, place.precision, ceilings)
    ready.clear()
    contestants.free_memory()
    return Contest(
        size=size,
        batch=batch,
        parameters=parameters,
        costs=costs,
        rows=summary_rows(observations, costs, EAGER),
        parity=parity,
        fresh=fresh,
        build_s=build_s,
        missing=missing,
        observations=observations,
    )


def _reason(name: str, error: Exception) -> str:
    """Return why a contestant is left out, in one line."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    logger.warning("leaving out %s: %s", name, reason, exc_info=logger.level < 20)
    return reason


def _observe(
    ready: Mapping[str, Pipeline],
    request: Mapping[str, Any],
    latent: NDArray[np.float32],
    clock: Clock,
    rounds: tuple[int, int],
) -> Iterator[GpuObservation]:
    """Yield the rounds, each contestant once in each; the order turns from round to round."""
    warmup, measured = rounds
    for number in range(-warmup, measured):
        order = list(ready.items())[:: 1 if number % 2 == 0 else -1]
        for position, (name, pipeline) in enumerate(order):
            yield GpuObservation(
                contestant=name,
                round=number,
                place=position,
                image=clock.ms(partial(pipeline.generate, **request)),
                loop=clock.ms(partial(_loop, pipeline, request)),
                decoder=clock.ms(partial(_decode, pipeline.backend, latent)),
            )


def _loop(pipeline: Pipeline, request: Mapping[str, Any]) -> None:
    """Run the scale steps."""
    for _ in pipeline.stream(**request):
        pass


def _decode(backend: Backend, latent: NDArray[np.float32]) -> None:
    """Run the decoder as a loop of one stage, which backends may record."""

    def loop(played: Backend, inputs: Mapping[str, Any]) -> Iterator[Any]:
        yield played.run("decoder", {"latent": inputs["latent"]})["image"]

    list(backend.play("decoder", {"latent": latent}, loop))


def _agreement(reference: Pipeline, candidate: Pipeline, request: Mapping[str, Any]) -> Agreement:
    conditions = {"class_ids": request["class_ids"]}
    batch = len(request["class_ids"])
    found = compare(
        reference, candidate, conditions, names=(REFERENCE, candidate.backend.name), max_batch=batch
    )
    return Agreement(
        token_agreement=found.token_agreement,
        max_relative_error=found.max_relative_error,
        psnr_db=found.forced_psnr_db,
    )


def part_costs(
    config: Any, batch: int, precision: str, ceilings: GpuCeilings
) -> dict[str, PartCost]:
    """Return the work of a guided batch, whole and in its two parts, from the sizes alone."""
    record = family(FAMILY)
    dtype = PRECISION_DTYPES[precision]
    stages = record.stages(config, kv_layout="delta", dtype=dtype)
    calls = [
        StageCall(name, 0.0, sizes[-1])
        for name, stage in stages.items()
        if name == "select" or not name.startswith("select")
        for sizes in stage.profiles(
            max_batch=batch, static_batch=True, best_ranks=1, max_ranks=stage.max_ranks
        )
    ]
    counted = call_costs(
        calls,
        {name: stage.io for name, stage in stages.items()},
        family=FAMILY,
        config=config,
        weight_dtype=dtype,
        text_encoder=None,
    )
    launches = ceilings.launch_ms(config.predictor.depth, config.num_scales)

    def cost(stages: Sequence[str], launch_ms: float) -> PartCost:
        costs: list[Cost] = [c.cost for c in counted if c.stage in stages and c.cost is not None]
        return part_cost(costs, ceilings, launch_ms)

    loop = [stage for stage in stages if stage != "decoder"]
    return {
        IMAGE: cost([*loop, "decoder"], launches),
        LOOP: cost(loop, launches),
        DECODER: cost(["decoder"], 0.0),
    }


def fresh_process(name: str, place: Place, request: Mapping[str, Any]) -> FreshProcess:
    """Return what a contestant needs in a process of its own; BackendError when it fails there."""
    job = json.dumps({"contestant": name, "place": place.to_dict(), "request": request})
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        lowest = pool.submit(_least_free_mib, done) if place.device == "cuda" else None
        free_before = torch.cuda.mem_get_info()[0] / 2**20 if lowest else 0.0
        try:
            found = run_child("nsp.benchmarks.gpu_child", [job], threads=num_threads())
        finally:
            done.set()
        gpu = None if lowest is None else max(0.0, free_before - lowest.result())
    return FreshProcess.from_dict({**found, "gpu_peak_mib": gpu})


def _least_free_mib(done: threading.Event) -> float:
    """Return the least memory that was free on the GPU until `done`, whoever used it."""
    least = float("inf")
    while not done.wait(_POLL_S):
        least = min(least, torch.cuda.mem_get_info()[0] / 2**20)
    return least
