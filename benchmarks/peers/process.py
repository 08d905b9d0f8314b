"""A family's peer as a contender: public code in its own process, in the same rounds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsp.benchmarks.contest.processes import Child
from nsp.benchmarks.record.times import Observation
from nsp.family.peer import Peer
from nsp.pipeline.pipeline import Pipeline


class PeerRunner:
    """A running peer; it tells whole batches and all steps apart, but no stages."""

    def __init__(self, name: str, process: Child, job: Mapping[str, Any]) -> None:
        self.name, self.process = name, process
        self.what: str = process.ask(job)["what"]

    def observe(self, request: Mapping[str, Any], *, number: int, place: int) -> Observation:
        """Return the times of one batch of as many images as `request` asks for."""
        seed = request["seed"]
        conditions = request.get("prompts") or request.get("class_ids") or seed
        first = seed if isinstance(seed, int) else seed[0]
        found = self.process.ask({"batch": len(conditions), "seed": first})
        return Observation(
            contender=self.name,
            round=number,
            place=place,
            wall_ms=round(found["wall_ms"], 4),
            stage_ms={},
            loop_ms=round(found["loop_ms"], 4),
        )


@contextmanager
def peer_runner(
    peer: Peer, clone: Path, pipeline: Pipeline, *, threads: int
) -> Iterator[PeerRunner]:
    """Yield the peer, ready to be timed; its process ends with the block.

    It has the shapes and settings of `pipeline`. Raises ConfigError for another folder,
    BackendError when its code does not run here.
    """
    peer.check(clone)
    job = {"path": str(clone.resolve()), "threads": threads}
    with Child(peer.program, threads=threads) as process:
        shapes = peer.job(pipeline.config, pipeline.sampling)
        yield PeerRunner(peer.name, process, {**shapes, **job})
