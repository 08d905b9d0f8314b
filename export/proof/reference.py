"""The reference: the PyTorch model in float32 with real prompts; every stage call is recorded.

Exported stages are compared with these calls one by one (forced.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from nsp.backends.torch import TorchBackend
from nsp.export.plan import ExportPlan
from nsp.export.proof.recorded import Call, Recording
from nsp.family.order import Order, Sampling, Step
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.results import Trace
from nsp.stage.arena import KVArena, KVShape, is_cached
from nsp.stage.backend import TENSORRT_RANKS, Loop, T


@dataclass(frozen=True)
class Generated:
    """One batch of images and all stage calls that made it."""

    orders: Sequence[Order[Sampling]]
    recording: Recording
    trace: Trace


@dataclass(frozen=True)
class Reference:
    """The PyTorch model and its generated batches."""

    pipeline: Pipeline
    batches: tuple[Generated, ...]

    @property
    def num_images(self) -> int:
        """Images of all batches."""
        return sum(len(batch.orders) for batch in self.batches)

    @property
    def recordings(self) -> tuple[Recording, ...]:
        """The calls of all batches."""
        return tuple(batch.recording for batch in self.batches)

    def smallest_first(self) -> list[Recording]:
        """Return the recordings of single images, or that of the smallest batch."""
        first, *others = sorted(self.batches, key=lambda batch: len(batch.orders))
        return [first.recording, *(b.recording for b in others if len(b.orders) == 1)]


class RecordingBackend(TorchBackend):
    """The torch backend, which records every call of one batch."""

    def forget(self) -> None:
        """Start again."""
        self._calls: list[Call] = []
        self._kv: KVShape | None = None
        self._unit, self._num_steps, self._step = "scale", 1, 0

    def recording(self) -> Recording:
        """Return the recording since `forget`."""
        return Recording(tuple(self._calls), self._kv, self._unit, self._num_steps)

    def play(self, name: str, inputs: Mapping[str, NDArray[Any]], loop: Loop[T]) -> Iterator[T]:
        """Yield the results of the loop, and record the step that each call belongs to."""
        for made in super().play(name, inputs, loop):
            if isinstance(made, Step):
                self._unit, self._num_steps, self._step = made.unit, made.total, made.index + 1
            yield made

    def run(
        self, stage: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all outputs, after recording them and the feeds."""
        given = outputs or {}
        results = super().run(stage, feeds, outputs)
        cached = [t for n, t in (*feeds.items(), *results.items()) if is_cached(n)]
        # torch creates new tensors for everything but the cache, and written parts of the cache do
        # not change, so nothing recorded here changes later.
        call = Call(
            stage=stage,
            step=self._step,
            feeds={n: _array(t) for n, t in feeds.items() if not is_cached(n)},
            outputs={
                n: _array(t) for n, t in results.items() if self._is_shared or not is_cached(n)
            },
            num_new=next((int(t.shape[0]) for t in given.values()), 0),  # token-major
            rows=next((int(t.shape[1]) for t in cached), 0),
        )
        self._calls.append(call)
        return results

    @cached_property
    def _is_shared(self) -> bool:
        """Whether several stages read the cache or add to it."""
        names = ((*io.inputs, *io.outputs) for io in self.stages_io.values())
        return sum(any(is_cached(name) for name in each) for each in names) > 1

    def new_arena(self, shape: KVShape) -> KVArena:
        """Return an empty arena, after recording its size."""
        self._kv = shape
        return super().new_arena(shape)


def _array(tensor: Any) -> NDArray[Any]:
    result: NDArray[Any] = tensor.detach().cpu().numpy()
    return result


def record_reference(plan: ExportPlan, system: Any) -> Reference:
    """Return the reference of `system` for the family's example orders, which call every stage.

    If latents grow, intermediate pictures are also decoded, so that every size is checked.
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
    if any(build.profiles for build in plan.builds):  # call compiled stages as TensorRT would
        backend.max_ranks = TENSORRT_RANKS
    batches = []
    for orders in family.examples(plan.config, plan.sampling):
        backend.forget()
        if pipeline.prompts is not None:
            pipeline.prompts.forget()  # so that every batch calls its text encoder
        trace = pipeline.trace(orders)
        for latent in trace.latents:
            if latent.shape != trace.latents[-1].shape:
                pipeline.decode(backend.upload(latent))
        batches.append(Generated(orders, backend.recording(), trace))
    return Reference(pipeline, tuple(batches))
