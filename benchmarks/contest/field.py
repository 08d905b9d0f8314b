"""Makes the contenders of one benchmark ready, beside the engines and the baseline."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsp.artifacts.engine_choice import complete_precisions
from nsp.artifacts.manifest import PRECISION_DTYPES, read_manifest
from nsp.backends.available import Device, backend_record
from nsp.benchmarks.contest.contenders import (
    CONTENDERS,
    Source,
    gate_words,
)
from nsp.benchmarks.contest.names import OTHERS
from nsp.benchmarks.contest.parity import compare
from nsp.benchmarks.contest.rounds import Runner, Timed
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.peers.process import peer_runner
from nsp.benchmarks.record.result import Entry
from nsp.errors import BackendError, ConfigError
from nsp.pipeline.pipeline import Pipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A contender of one benchmark; `source` raises NspError where it cannot be made."""

    name: str
    what: str
    source: Callable[[], Source]


@dataclass(frozen=True)
class Ready:
    """What is said of a contender, and what is timed; None: it is missing."""

    entry: Entry
    runner: Timed | None = None
    source: Source | None = None  # for fresh processes; None: not in one
    process: int | None = None  # its own, by number


def default_names(subject: Subject) -> tuple[str, ...]:
    """Return all contenders of a full benchmark on the device of the engines."""
    there = [
        name
        for name in OTHERS
        if subject.device in set(CONTENDERS[name].by_default) & set(CONTENDERS[name].devices)
    ]
    if subject.baseline is None:
        there = [name for name in there if not CONTENDERS[name].from_checkpoint]
    return (*there, *other_precisions(subject))


def other_precisions(subject: Subject) -> tuple[str, ...]:
    """Return the precisions besides that in use in which the device runs the folder's engines."""
    pipeline = subject.contender.pipeline
    record, used = backend_record(pipeline.backend.name), pipeline.precision
    folder = subject.contender.source.path
    device: Device = "cuda" if subject.device == "cuda" else "cpu"
    there = complete_precisions(folder, read_manifest(folder), record, device)
    return tuple(each for each in there if each != used)


def asked_for(name: str, subject: Subject, threads: int) -> Asked:
    """Return a contender by its name."""
    source = subject.contender.source
    if name in PRECISION_DTYPES:
        return _in_precision(name, subject)
    if name not in CONTENDERS:
        other = replace(source, label=name, backend=name)
        return Asked(name, f"the same folder's engines, run by {name}", lambda: other)
    contender = CONTENDERS[name]

    def place() -> Source:
        if contender.from_checkpoint and subject.baseline is None:
            raise BackendError(f"it needs the PyTorch model: {subject.baseline_missing}")
        contender.check(subject.device)
        made_from = subject.baseline if contender.from_checkpoint else subject.contender
        assert made_from is not None
        options = {"precision": subject.contender.pipeline.precision, "device": subject.device}
        if not contender.from_checkpoint:
            options = dict(made_from.source.options)
        path = made_from.source.path
        return Source(
            label=name,
            path=path,
            backend=made_from.source.backend,
            options={**options, "num_threads": threads},
            contender=name,
        )

    return Asked(name, contender.what, place)


def _in_precision(precision: str, subject: Subject) -> Asked:
    """Return the folder's engines in another precision."""
    source, used = subject.contender.source, subject.contender.pipeline.precision
    label = f"{source.label} {precision}"

    def place() -> Source:
        if precision == used:
            raise ConfigError(f"the measured engines are already {used}; choose another precision")
        return replace(source, label=label, options={**source.options, "precision": precision})

    manifest = read_manifest(source.path)
    words = gate_words(manifest, source.backend, precision)
    return Asked(label, f"the same engines in {precision}{words}", place)


def make_ready(
    asked: Sequence[Asked],
    subject: Subject,
    *,
    batches: Sequence[int],
    seed: int,
    on_start: Callable[[str], None],
) -> Iterator[Ready]:
    """Yield every contender: ready, having made a batch of every size, or with its reason.

    Nothing that one contender raises ends the others: torch, its compilers and CUDA have no common
    class of errors.
    """
    for each in asked:
        on_start(f"preparing {each.name}")
        entry, start = Entry(name=each.name, what=each.what), time.perf_counter()
        try:
            source = each.source()
            pipeline = source.load()
            pipeline.sampling = subject.contender.pipeline.sampling
            for batch in batches:
                pipeline.generate(**subject.request(batch, seed))
            prepared = replace(entry, prepare_s=round(time.perf_counter() - start, 2))
            agreed = _agreement(subject, pipeline, seed) if subject.device != "cpu" else {}
        except Exception as error:
            reason = " ".join(str(error).split("\n")[0].split())[:300] or type(error).__name__
            logger.warning("%s is not timed: %s", each.name, reason)
            logger.debug("why %s is not timed", each.name, exc_info=True)
            yield Ready(replace(entry, missing=reason))
            continue
        runner = Runner(each.name, pipeline, device=subject.device)
        yield Ready(replace(prepared, **agreed), runner, source)


def _agreement(subject: Subject, pipeline: Pipeline, seed: int) -> Mapping[str, Any]:
    """Return how closely a contender computes what the baseline does, of one batch."""
    if subject.baseline is None:
        return {}
    found = compare(subject.baseline.pipeline, pipeline, [subject.request(1, seed)])
    return {
        "token_agreement": found.token_agreement,
        "max_relative_error": found.max_relative_error,
        "psnr_db": found.forced_psnr_db,
    }


def peers(subject: Subject, clone: Path | None, threads: int, stack: ExitStack) -> Iterator[Ready]:
    """Yield the public code in a clone, running in its own process until `stack` is closed."""
    if clone is None:
        return
    pipeline = subject.contender.pipeline
    declared = pipeline.family.peers
    if subject.device != "cpu" or not declared:
        raise BackendError(
            f"family {pipeline.family.name} has no public code that can be timed beside engines on "
            f"{subject.device}; omit --peer"
        )
    (peer,) = [each for each in declared if each.is_clone(clone)] or declared[:1]
    peer.check(clone)
    runner = stack.enter_context(peer_runner(peer, clone, pipeline, threads=threads))
    entry = Entry(name=runner.name, what=runner.what)
    yield Ready(entry, runner, process=runner.process.process.pid)
