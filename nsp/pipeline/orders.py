"""Makes orders from the user's arguments and cuts them into batches; checks every value.

Everywhere, seeds follow one rule: the k-th image of the same condition has seed + k; two prompts
share the seed; a list gives each image its own. So any image can be made again alone, and does not
change when others are added.
"""

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from nsp import values
from nsp.errors import ConfigError
from nsp.family.contract import AnyFamily
from nsp.family.order import Order, S, Sampling
from nsp.stage.backend import Backend

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 8
MAX_IMAGES = 1_000_000  # per run: the list of its orders then needs 250 MB of memory


def make_orders(
    sampling: S,
    *,
    prompts: Iterable[str] | None = None,
    class_ids: Iterable[int] | None = None,
    seed: int | Sequence[int] = 0,
    num_images: int = 1,
    negative: str | Sequence[str | None] | None = None,
    given: Mapping[str, object] | None = None,
) -> list[Order[S]]:
    """Return `num_images` orders for every prompt, or class id, or for no condition at all.

    Without a condition, a list of seeds gives their number. `negative` is one prompt for all, or
    one per condition; `given` are arrays with a row per image.
    Raises ConfigError for values of a wrong kind; whether they fit a model is checked later.
    """
    texts = None if prompts is None else prompt_texts(prompts)
    numbers = None if class_ids is None else class_numbers(class_ids).tolist()
    if texts and numbers:
        raise ConfigError(
            "prompts and class ids are both given; a model takes only one kind; choose one"
        )
    if texts == () or numbers == []:
        kind = "prompts" if numbers is None else "class ids"
        raise ConfigError(f"nothing to generate: give one or more {kind}")
    conditions: list[str | int | None] = [*(texts or ()), *(numbers or ())] or [None]
    num_images = values.count("num_images", num_images)
    if conditions == [None] and num_images == 1 and _is_list(seed):
        num_images = max(len(seed), 1)
    check_total(num_images * len(conditions))
    if num_images > 1 and sampling.greedy is not None:
        logger.warning("%s is greedy: all seeds give the same picture", sampling.greedy)
    whole = [condition for condition in conditions for _ in range(num_images)]
    nulls = [each for each in _nulls(negative, len(conditions)) for _ in range(num_images)]
    arrays = _rows(given or {}, len(whole))
    return [
        Order(condition, number, sampling, null, carried)
        for condition, number, null, carried in zip(
            whole, _seeds(seed, whole), nulls, arrays, strict=True
        )
    ]


def check_total(num_images: int) -> None:
    """Raise ConfigError for more images than one run makes."""
    if num_images > MAX_IMAGES:
        raise ConfigError(
            f"{num_images} images are requested, but one run makes at most {MAX_IMAGES}; use "
            "several runs with different seeds"
        )


def check_seeds(seeds: Sequence[int], num_images: int) -> None:
    """Raise ConfigError for a list of seeds that has not one for each image."""
    if len(seeds) != num_images:
        raise ConfigError(
            f"seed has {len(seeds)} numbers for {num_images} images; give one for each, or one "
            "number for all"
        )


def _is_list(seed: int | Sequence[int]) -> TypeGuard[Sequence[int]]:
    """Return whether a seed is a list with one for each image."""
    if isinstance(seed, np.ndarray):
        return seed.ndim > 0
    return isinstance(seed, Sequence) and not isinstance(seed, str | bytes)


def _seeds(seed: int | Sequence[int], conditions: Sequence[Hashable]) -> list[int]:
    """Return the seed of every image."""
    if _is_list(seed):
        check_seeds(seed, len(conditions))
        return [values.seed(each) for each in seed]
    first, made = values.seed(seed), Counter[Hashable]()
    found = []
    for condition in conditions:
        found.append(values.seed(first + made[condition]))
        made[condition] += 1
    return found


def _nulls(negative: object, count: int) -> list[str | None]:
    """Return the negative prompt of every condition."""
    if negative is None or isinstance(negative, str):
        return [negative] * count
    if isinstance(negative, bytes) or not isinstance(negative, Iterable):
        raise ConfigError(f"negative_prompt {values.shown(negative)} is not a text")
    found = list(negative)
    if len(found) != count:
        raise ConfigError(
            f"negative_prompt has {len(found)} texts for {count} prompts; give one for each, or one"
        )
    if wrong := [each for each in found if each is not None and not isinstance(each, str)]:
        raise ConfigError(f"negative_prompt {values.shown(wrong[0])} is not a text")
    return found


def _rows(given: Mapping[str, Any], count: int) -> list[dict[str, NDArray[Any]]]:
    """Return the given arrays of every order, from arrays with one row per image."""
    for name, array in given.items():
        if not isinstance(array, np.ndarray):
            raise ConfigError(f"{name} is a {type(array).__name__}; expected a NumPy array")
        if array.ndim == 0 or len(array) != count:
            raise ConfigError(f"{name} is {array.dtype} {array.shape}; expected one row per image")
    return [{name: array[row] for name, array in given.items()} for row in range(count)]


def prompt_texts(prompts: object) -> tuple[str, ...]:
    """Return the prompts of a list, an iterator or a NumPy array of texts; there may be none.

    Raises ConfigError naming the first item that is not a text.
    """
    if isinstance(prompts, str | bytes):
        raise ConfigError(f"prompts must be a list of texts: prompts=[{values.shown(prompts)}]")
    ordered = not isinstance(prompts, Mapping | Set)
    try:
        texts = list(prompts) if ordered and isinstance(prompts, Iterable) else None
    except TypeError:
        texts = None
    if texts is None:
        raise ConfigError(f"prompts must be a list of texts, not {values.shown(prompts)}")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ConfigError(f"prompt {number} is {values.shown(text)}, not a text")
    return tuple(_text(str(text)) for text in texts)


def _text(prompt: str) -> str:
    """Return `prompt` as valid UTF-8: lone surrogates (bad bytes of a command line) as U+FFFD."""
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def class_numbers(class_ids: object) -> NDArray[np.int64]:
    """Return the class ids (B,) of a list or array of integers; there may be none."""
    if isinstance(class_ids, Iterator):
        class_ids = list(class_ids)
    try:
        ids = np.asarray(class_ids)
    except (TypeError, ValueError):  # rows of different lengths
        ids = np.array(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(f"class_ids must be a list of integers, not {values.shown(class_ids)}")
    return ids.astype(np.int64)


def check_condition(family: AnyFamily, config: Any, order: Order[Sampling]) -> None:
    """Raise ConfigError unless this model accepts the order's condition."""
    kind, condition = family.condition(config), order.condition
    if kind == "none":
        if condition is not None:
            raise ConfigError("this model is unconditional: it takes no prompts and no class ids")
    elif kind == "prompt":
        if isinstance(condition, int):
            raise ConfigError("this model is text-conditional: it takes prompts, not class ids")
        without = condition is None and family.draws_without_prompt
        if condition is None and not without:
            raise ConfigError("this model is text-conditional: give one or more prompts")
        if not isinstance(condition, str) and not without:
            raise ConfigError(f"a prompt is a text, not {values.shown(condition)}")
        if not isinstance(order.negative, str | None):
            raise ConfigError(f"a negative prompt is a text, not {values.shown(order.negative)}")
        if isinstance(condition, str) and not condition.strip() and not family.takes_no_prompt:
            raise ConfigError("a prompt is empty; write what the image should show")
        return
    elif isinstance(condition, str):
        raise ConfigError("this model is class-conditional: it takes class ids, not prompts")
    elif condition is None:
        raise ConfigError("this model is class-conditional: give one or more class ids")
    elif isinstance(condition, bool) or not isinstance(condition, int):
        raise ConfigError(f"a class id is an integer, not {values.shown(condition)}")
    elif not 0 <= condition <= config.num_classes:
        count = config.num_classes
        raise ConfigError(
            f"class id {condition} is outside 0..{count - 1} ({count} is the null class)"
        )
    if order.negative is not None:
        raise ConfigError("this model takes no prompts; omit negative_prompt")


class Takes(Protocol):
    """The parts of a pipeline that cutting into batches needs."""

    family: AnyFamily
    config: Any
    backend: Backend
    max_batch: int | None


def cut_batches(
    pipeline: Takes, orders: Sequence[Order[Sampling]], batch_size: int | None = None
) -> list[list[int]]:
    """Return the orders' indices batch by batch; orders of equal keys share batches, in order.

    If the backend pads batches, a padded batch is not larger than `batch_size` after padding.
    """
    size = pipeline.backend.padded_batch_size(choose_batch_size(pipeline, batch_size))
    groups: dict[Hashable, list[int]] = {}
    for place, order in enumerate(orders):
        groups.setdefault(pipeline.family.batch_key(pipeline.config, order), []).append(place)
    cut = [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]
    return sorted(cut)


def choose_batch_size(pipeline: Takes, requested: int | None) -> int:
    """Return how many images to make at once; ConfigError for more than the engines accept."""
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
