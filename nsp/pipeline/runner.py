"""Runs batches of orders on a backend, for the pipeline."""

import logging
import threading
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nsp import values
from nsp.errors import ConfigError
from nsp.family.contract import AnyFamily
from nsp.family.order import Order, Sampling, Step
from nsp.pipeline.encoding import PromptEncoder
from nsp.pipeline.orders import check_condition, cut_batches
from nsp.pipeline.padding import cut_step, pad_latent, pad_orders
from nsp.pipeline.results import StreamStep, Trace
from nsp.stage.arena import Array
from nsp.stage.backend import Backend

if TYPE_CHECKING:
    from nsp.text.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _differences(one: Order[Sampling], other: Order[Sampling]) -> str:
    """Return in words what two orders ask for differently: settings and given arrays."""
    before, after = one.sampling.to_dict(), other.sampling.to_dict()
    words = [f"{n}={after[n]!r} instead of {before[n]!r}" for n in after if after[n] != before[n]]
    words += [f"{name} is given to one only" for name in one.given.keys() ^ other.given.keys()]
    return ", ".join(words) or "its prompt"


class Steps(Iterator[T]):
    """The steps of one batch, each computed only when it is requested."""

    def __init__(self, pipeline: "OrderRunner", made: Generator[T]) -> None:
        self._pipeline, self._made = pipeline, made

    def __next__(self) -> T:
        """Return the next step."""
        with self._pipeline.turn:
            return next(self._made)

    def close(self) -> None:
        """Make no further step, and return what the backend lent."""
        with self._pipeline.turn:
            self._made.close()


class OrderRunner:
    """A model on a backend: orders in, steps and images out.

    Threads may share one: they take turns after each picture or step, and the results are the same
    as without other threads. If the backend has batch sizes, a smaller batch is padded with repeats
    of its last order, and the results do not include these.
    """

    def __init__(
        self,
        family: AnyFamily,
        config: Any,
        backend: Backend,
        *,
        tokenizer: "PromptTokenizer | None" = None,
        sampling: Sampling | None = None,
        model_hash: str = "",
        max_batch: int | None = None,
        precision: str = "fp32",
    ) -> None:
        self.family, self.config, self.backend = family, config, backend
        self.tokenizer = tokenizer
        self.sampling: Any = family.sampling() if sampling is None else sampling
        self.model_hash, self.max_batch, self.precision = model_hash, max_batch, precision
        self.num_padding_rows = 0  # images computed only to fill a batch size, so far
        self.turn = threading.RLock()  # locked by the thread that uses the backend
        self.prompts = (
            None if tokenizer is None else PromptEncoder(tokenizer, backend, max_batch=max_batch)
        )

    def run(self, orders: Sequence[Order[Sampling]], *, trace: bool = False) -> Iterator[Step]:
        """Return an iterator over the steps of one batch; all other methods use this one.

        Orders with the same `batch_key` may share a batch, whatever their other settings, and no
        order changes another's image. With `trace`, `drawn` of a step also has the logits. All
        orders are checked before the first step; raises ConfigError.
        """
        self.check(orders)
        inputs = self._inputs(orders)
        return Steps(self, self._play(inputs, len(orders), trace=trace))

    def images(
        self, orders: Sequence[Order[Sampling]], *, clipped: bool = True
    ) -> NDArray[np.float32]:
        """Return the images (B, 3, H, W) in [0, 1] of one batch, without intermediate steps.

        Not `clipped`, values may lie a little outside, if the model's decoder does not clip: some
        published figures are those of pictures that were resized before.
        """
        self.check(orders)
        inputs = self._inputs(orders)
        with self.turn:
            (image,) = self.backend.play("picture", inputs, self._loop_and_decoder)
            found = self.backend.download(image[: len(orders)])
        return np.clip(found, 0, 1, out=found) if clipped else found

    def trace(self, orders: Sequence[Order[Sampling]]) -> Trace:
        """Return the results of every step of one batch."""
        tokens, logits, latents, last = [], [], [], None
        for step in self.run(orders, trace=True):
            last = StreamStep(step.index, step.total, self, step)
            if step.latent is not None:
                latents.append(last.latent)
            if last.has_tokens:
                tokens.append(last.tokens)
                logits.append(last.logits)
        assert last is not None  # a loop has at least one step
        return Trace(tokens, logits, latents, last.decode())

    def check(self, orders: Sequence[Order[Sampling]]) -> None:
        """Raise ConfigError unless these orders can be one batch of this model."""
        wrong = (
            orders
            if isinstance(orders, str | Order)
            else [each for each in orders if not isinstance(each, Order)]
        )
        if wrong:
            raise ConfigError(f"orders is a list of nsp.Order, not {values.shown(orders)}")
        if not orders:
            raise ConfigError("nothing to generate: give at least one order")
        if self.max_batch is not None and len(orders) > self.max_batch:
            raise ConfigError(
                f"batch of {len(orders)} is outside the engine's 1..{self.max_batch}; "
                f"generate fewer at once or rebuild with --max-batch {len(orders)}"
            )
        keys = [self.check_order(order) for order in orders]
        for number, (key, order) in enumerate(zip(keys, orders, strict=True)):
            if key != keys[0]:
                apart = _differences(orders[0], order)
                raise ConfigError(
                    f"order {number} cannot share a batch with order 0: {apart} needs other shapes "
                    "or steps; pipe.batches(orders) groups those that can"
                )

    def batches(self, orders: Sequence[Order[Sampling]]) -> list[list[Order[Sampling]]]:
        """Return the orders in batches that `run` accepts, each as large as it may be."""
        for order in orders:
            self.check_order(order)
        return [[orders[place] for place in places] for places in cut_batches(self, orders)]

    def check_order(self, order: Order[Sampling]) -> Hashable:
        """Return an order's batch key; ConfigError for an order that this model does not accept."""
        check_condition(self.family, self.config, order)
        texts = (order.condition, self.family.null_prompt(self.config, order))
        if self.prompts is None and any(isinstance(each, str) for each in texts):
            raise ConfigError(
                "this model was loaded without its text encoder and draws only pictures without a "
                "prompt; omit prompts, or export the engines again"
            )
        declared = self.family.given(self.config)
        for name, array in order.given.items():
            if name not in declared:
                known = ", ".join(declared) or "nothing"
                raise ConfigError(
                    f"an order of this model may have {known} in `given`, not {name!r}"
                )
            declared[name].check(name, array)
        if not isinstance(order.sampling, self.family.sampling):
            raise ConfigError(
                f"sampling is a {type(order.sampling).__name__}; family {self.family.name} takes a "
                f"{self.family.sampling.__name__}"
            )
        most = self.backend.max_ranks
        if most is not None and order.sampling.sorted_codes > most:
            raise ConfigError(
                f"top_k={order.sampling.sorted_codes} is more than backend {self.backend.name} can "
                f"sort; use at most {most}, 0 for none, or another backend"
            )
        return self.family.batch_key(self.config, order)

    def _inputs(self, orders: Sequence[Order[Sampling]]) -> dict[str, NDArray[Any]]:
        """Return the loop's inputs on the host for checked orders, padded, with encoded prompts."""
        orders = self._padded(orders)
        text, prompts = None, [order.condition for order in orders]
        nulls = [self.family.null_prompt(self.config, order) for order in orders]
        if self.prompts is not None and any(each is not None for each in (*prompts, *nulls)):
            with self.turn:
                text = self.prompts.encode([str(each or "") for each in prompts], nulls)
        return self.family.inputs(self.config, orders, text)

    def _padded(self, orders: Sequence[Order[Sampling]]) -> Sequence[Order[Sampling]]:
        """Return a batch padded to a size that the backend has; padding rows are counted."""
        size = self.backend.padded_batch_size(len(orders))
        if added := size - len(orders):
            with self.turn:
                self.num_padding_rows += added
                total = self.num_padding_rows
            logger.debug(
                "a batch of %d is padded to %d; %d padding rows so far", len(orders), size, total
            )
        return pad_orders(orders, size)

    def _play(
        self, inputs: Mapping[str, NDArray[Any]], num_images: int, *, trace: bool
    ) -> Generator[Step]:
        """Yield the steps of a batch, without padding; the calling thread has locked `turn`."""
        name, loop = ("traced", self._loop) if trace else ("steps", self._loop_without_logits)
        for step in self.backend.play(name, inputs, loop):
            yield cut_step(step, num_images)

    def _loop(self, backend: Backend, inputs: Mapping[str, Array]) -> Iterator[Step]:
        return self.family.loop(backend, self.config, inputs)

    def _loop_without_logits(self, backend: Backend, inputs: Mapping[str, Array]) -> Iterator[Step]:
        for step in self._loop(backend, inputs):
            drawn = {name: parts for name, parts in step.drawn.items() if name != "logits"}
            yield replace(step, drawn=drawn)

    def _loop_and_decoder(self, backend: Backend, inputs: Mapping[str, Array]) -> Iterator[Array]:
        latent: Array | None = None
        for step in self._loop(backend, inputs):
            latent = step.latent
        assert latent is not None  # the last step ends with a picture
        yield backend.run("decoder", {"latent": latent})["image"]

    def decode(self, latent: Array, *, clipped: bool = True) -> NDArray[np.float32]:
        """Return the picture (B, 3, H, W) in [0, 1] of a latent on the backend; see `images`."""
        count = latent.shape[0]
        with self.turn:
            latent = pad_latent(self.backend, latent, self.backend.padded_batch_size(count))
            image = self.backend.run("decoder", {"latent": latent})["image"]
            found = self.backend.download(image[:count])
        return np.clip(found, 0, 1, out=found) if clipped else found

    def download(self, array: Any) -> NDArray[Any]:
        """Return a NumPy copy of an array of the backend."""
        with self.turn:
            return self.backend.download(array)
