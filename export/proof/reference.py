"""What is correct: real prompts through the PyTorch model in float32, with every stage call kept.

Exported stages are held to these calls one by one (teacher forcing): each gets the inputs PyTorch
gave, and only its key/value cache is its own; where several stages share a cache, each gets
PyTorch's, and what it adds is compared too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.backends.torch import TorchBackend
from nsp.export.plan import ExportPlan
from nsp.export.proof.recorded import Call, Recording
from nsp.family.order import Order
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import Trace
from nsp.stage.arena import KVArena, KVShape
from nsp.stage.backend import TENSORRT_RANKS

_CACHE_PREFIX = "past_"


@dataclass(frozen=True)
class Generated:
    """One batch of images and everything that was called to make it."""

    orders: Sequence[Order[Any]]
    calls: tuple[Call, ...]
    kv: KVShape
    trace: Trace


@dataclass(frozen=True)
class Reference:
    """The PyTorch model and what it generated."""

    pipeline: Pipeline
    batches: tuple[Generated, ...]

    @property
    def num_images(self) -> int:
        """Images of all batches."""
        return sum(len(batch.orders) for batch in self.batches)


def smallest_recordings(reference: Reference) -> tuple[Recording, ...]:
    """Return one image's calls, and of the stages it has none, those of another batch."""
    first, *others = sorted(reference.batches, key=lambda batch: len(batch.orders))
    seen = {call.stage for call in first.calls}
    rest = (
        Recording(tuple(call for call in batch.calls if call.stage not in seen), batch.kv)
        for batch in others
        if len(batch.orders) == 1
    )
    return (Recording(first.calls, first.kv), *(each for each in rest if each.calls))


class RecordingBackend(TorchBackend):
    """The torch backend, keeping every call."""

    calls: list[Call]
    kv: KVShape

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs, having noted them and the feeds."""
        given = outputs or {}
        results = super().run(stage, feeds, outputs)
        shared = self._num_caching > 1
        # torch makes new tensors for all but the cache, of which a written part stays as it is: so
        # nothing here changes later.
        call = Call(
            stage=stage,
            feeds={
                n: _array(t) for n, t in feeds.items() if shared or not n.startswith(_CACHE_PREFIX)
            },
            outputs={n: _array(t) for n, t in results.items() if shared or n not in given},
            num_new=next((int(t.shape[0]) for t in given.values()), 0),  # token-major
            rows=next((int(t.shape[1]) for t in given.values()), 0),
        )
        self.calls.append(call)
        return results

    @cached_property
    def _num_caching(self) -> int:
        """How many stages read the cache or add to it."""
        names = ([*io.inputs, *io.outputs] for io in self.stages_io.values())
        return sum(any(name.startswith(("past_", "new_k")) for name in each) for each in names)

    def new_arena(self, shape: KVShape) -> KVArena:
        """Return an empty arena, having noted its size."""
        self.kv = shape
        return super().new_arena(shape)


def _array(tensor: Any) -> NDArray[Any]:
    result: NDArray[Any] = tensor.detach().cpu().numpy()
    return result


def record_reference(plan: ExportPlan, system: Any) -> Reference:
    """Return what `system` generates for the family's own requests, which call every stage.

    Where latents grow, the pictures on the way are decoded too: so every size is checked.
    """
    family = plan.record.family
    backend = RecordingBackend(
        family.learner.modules(system, "delta"),
        family.stages_io(system.config, kv_layout="delta", dtype="float32"),
        kv_layout="delta",
        device="cpu",
    )
    pipeline = Pipeline(
        family,
        system.config,
        backend,
        tokenizer=system.prompt_tokenizer,
        sampling=plan.sampling,
    )
    if any(build.profiles for build in plan.builds):  # compiled stages are called as TensorRT would
        backend.max_ranks = TENSORRT_RANKS
    batches = []
    for orders in family.examples(plan.config, plan.sampling):
        backend.calls = []
        if pipeline.prompts is not None:
            pipeline.prompts.forget()  # every batch calls its text encoder
        trace = pipeline.trace(orders)
        for latent in trace.latents:
            if latent.shape != trace.latents[-1].shape:
                pipeline.decode(backend.upload(latent))
        batches.append(Generated(orders, tuple(backend.calls), backend.kv, trace))
    return Reference(pipeline, tuple(batches))


def psnr_db(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the peak signal-to-noise ratio of images in [0, 1], in dB, at most 200."""
    error = float(np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2))
    if not np.isfinite(error):
        return 0.0
    return 200.0 if error == 0 else min(200.0, -10 * float(np.log10(error)))
