"""A run of many images, cut into batches; no image depends on how it is cut.

planned = plan_images(prompts=["red apple"], seed=0, num_images=8)
for batch in cut_batches(planned, 4):
    for step in stream_batch(pipeline, batch):
        ...
    pictures = to_uint8(step.decode())
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsp import values
from nsp.errors import ConfigError
from nsp.pipeline.pipeline import Pipeline
from nsp.pipeline.requests import class_numbers, prompt_texts
from nsp.pipeline.results import StreamStep

DEFAULT_BATCH_SIZE = 8
MAX_IMAGES = 1_000_000  # of one run: its list is held in memory, 250 MB then


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image of a run. Its condition and seed alone decide what it shows."""

    index: int  # in the run
    seed: int
    prompt: str | None = None
    class_id: int | None = None

    @property
    def title(self) -> str:
        """What it should show, in words."""
        if self.prompt is not None:
            return self.prompt or "no prompt"
        return f"class {self.class_id}"


def plan_images(
    *,
    prompts: Iterable[str] = (),
    class_ids: Iterable[int] = (),
    seed: int = 0,
    num_images: int = 1,
    allow_empty: bool = False,
    seeds: Sequence[int | None] = (),
) -> list[PlannedImage]:
    """Return `num_images` images for every prompt, or for every class id, in order.

    The k-th image of the same condition has seed `seed` + k, so an image can be made again alone,
    and does not change when other prompts join the run. `seeds` are those of single conditions, in
    their order, in place of `seed`; None, and what is missing at the end, is `seed`. Raises
    ConfigError unless exactly one kind of condition is given, or when a prompt is no text, or empty
    unless `allow_empty`: some models take that for no prompt, and `check_images` says which do not.
    """
    texts = prompt_texts(prompts, allow_empty=allow_empty)
    ids = class_numbers(class_ids).tolist()
    if texts and ids:
        raise ConfigError("prompts and class ids are both given; a model takes one kind: choose")
    if not texts and not ids:
        raise ConfigError("nothing to generate: give at least one prompt or class id")
    seed, num_images = values.seed(seed), values.count("num_images", num_images)
    if (total := num_images * max(len(texts), len(ids))) > MAX_IMAGES:
        raise ConfigError(
            f"{total} images are planned; one run makes at most {MAX_IMAGES}: make several, each "
            "with another seed"
        )
    made: Counter[tuple[str | None, int | None]] = Counter()
    planned: list[PlannedImage] = []
    conditions = [*((_text(p), None) for p in texts), *((None, c) for c in ids)]
    for condition, own in itertools.zip_longest(conditions, seeds[: len(conditions)]):
        first = seed + made[condition] if own is None else values.seed(own)
        for number in range(first, first + num_images):
            planned.append(PlannedImage(len(planned), number, *condition))
        made[condition] += num_images if own is None else 0
    values.seed(max(image.seed for image in planned))
    return planned


def _text(prompt: str) -> str:
    """Return `prompt` with half surrogates (bad bytes of a command line) as U+FFFD, to be UTF-8."""
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def choose_batch_size(pipeline: Pipeline, requested: int | None) -> int:
    """Return how many images to make at once; raise ConfigError for more than the engines take."""
    limit = pipeline.max_batch
    if requested is None:
        return DEFAULT_BATCH_SIZE if limit is None else min(DEFAULT_BATCH_SIZE, limit)
    requested = values.count("batch_size", requested)
    if limit is not None and requested > limit:
        raise ConfigError(
            f"batch size {requested} is outside the engine's 1..{limit}; "
            f"use --batch-size {limit} or export again with --max-batch {requested}"
        )
    return requested


def check_images(pipeline: Pipeline, planned: Sequence[PlannedImage]) -> None:
    """Raise ConfigError if any condition is not for this model, before time goes into others."""
    if not planned:
        raise ConfigError("nothing to generate: no image is planned")
    first_of = {(image.prompt, image.class_id): image for image in reversed(planned)}
    for image in first_of.values():
        pipeline.stream(**_conditions([image]), more_smooth=False)  # checks now, runs when iterated


def cut_batches(planned: Sequence[PlannedImage], batch_size: int) -> Iterator[list[PlannedImage]]:
    """Return the images in order, `batch_size` at a time; ConfigError for less than one."""
    starts = range(0, len(planned), values.count("batch_size", batch_size))
    return (list(planned[start : start + batch_size]) for start in starts)


def stream_batch(
    pipeline: Pipeline, batch: Sequence[PlannedImage], **sampling: Any
) -> Iterator[StreamStep]:
    """Return the scale steps of one batch, with the random numbers of its images."""
    settings = pipeline.sampling.changed(sampling)
    drawn = [pipeline.random_arrays(settings, seed=i.seed, batch=1, given={}) for i in batch]
    arrays: dict[str, Any] = {
        name: np.concatenate([each[name] for each in drawn]) for name in drawn[0]
    }
    return pipeline.stream(**_conditions(batch), **arrays, **sampling)


def _conditions(batch: Sequence[PlannedImage]) -> dict[str, Any]:
    """Return `Pipeline.stream`'s argument for the conditions of a batch."""
    prompts = [image.prompt for image in batch if image.prompt is not None]
    class_ids = [image.class_id for image in batch if image.class_id is not None]
    return {"prompts": prompts} if prompts else {"class_ids": class_ids}
