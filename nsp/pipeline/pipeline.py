"""The pipeline: orders in, images out, from engines or from a checkpoint.

    pipe = nsp.Pipeline.from_pretrained("engines/")
    pipe("red apple", seed=3).images[0].save("apple.png")

Everything goes through `run`; `generate`, `stream` and the call make orders for it.
"""

import hashlib
import logging
import shlex
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

import numpy as np

from nsp import values
from nsp.artifacts.engines import open_engine_dir
from nsp.cores import num_threads
from nsp.errors import CheckpointError, ConfigError, EngineError
from nsp.family.contract import AnyFamily
from nsp.family.order import Order, Sampling
from nsp.paths import NOTHING, describe, wrong_path
from nsp.pipeline.call import CALL_ARGUMENTS, OUTPUT_TYPES, OnStepEnd, call
from nsp.pipeline.keywords import LoadOptions, Requested, Settings
from nsp.pipeline.orders import make_orders
from nsp.pipeline.results import GenerateResult, PipelineOutput, StreamStep, to_uint8
from nsp.pipeline.runner import OrderRunner, Steps

if TYPE_CHECKING:
    from nsp.family.system import System

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHECKPOINT_OPTIONS = ("device", "verify", "lora")
_ENGINE_OPTIONS = ("precision", "device", "num_threads", "verify")


@dataclass(frozen=True)
class Origin:
    """The arguments of `load_pipeline`, to load the same model again in another process."""

    path: Path
    backend: str
    options: Mapping[str, Any]


class Pipeline(OrderRunner):
    """A loaded model that takes prompts or class ids; `run` takes orders.

    Threads may share one. A pickled pipeline (sent to another process, or copied) consists of its
    path and options, and is loaded again in the other process.
    """

    origin: Origin | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, backend: str = "auto", **options: Unpack[LoadOptions]
    ) -> "Pipeline":
        """Return the model in `path`, an engine or a checkpoint folder, as `load_pipeline` does."""
        return load_pipeline(path, backend, **options)

    def __repr__(self) -> str:
        """Return the model and its backend in words."""
        model = self.model_hash[:12] or "in memory"
        limit = "any batch" if self.max_batch is None else f"batches of 1 to {self.max_batch}"
        return (
            f"Pipeline({self.family.name} {model}, {self.backend.name} {self.precision}, {limit})"
        )

    def __copy__(self) -> "Pipeline":
        """Return another pipeline with the same backend, which both use in turn."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to load this pipeline again; ConfigError when it was made in memory."""
        if self.origin is None:
            raise ConfigError(
                "this pipeline was made from modules in memory and cannot be sent to another "
                "process or copied; save a checkpoint and load a pipeline in each process with "
                "nsp.load_pipeline(path)"
            )
        return _load_again, (self.origin, self.model_hash), {"sampling": self.sampling}

    def generate(
        self,
        *,
        prompts: Iterable[str] | None = None,
        class_ids: Iterable[int] | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str | None] | None = None,
        trace: bool = False,
        **options: Unpack[Requested],
    ) -> GenerateResult:
        """Return one image per prompt or class id.

        The k-th image of the same condition has seed `seed` + k; a list gives each its own.
        `options` override the model's settings (guidance_scale, top_k, ...) or are arrays that
        orders carry, one row per image (`pipe.family.given(pipe.config)` names them).
        Raises ConfigError for a bad request.
        """
        trace = values.flag("trace", trace)
        orders = self._batch(prompts, class_ids, seed, negative_prompt, options, ("trace",))
        traced = self.trace(orders) if trace else None
        image = self.images(orders) if traced is None else traced.image
        kinds = [order.condition for order in orders]
        return GenerateResult(
            images=to_uint8(image),
            seed=orders[0].seed,
            prompts=tuple(each for each in kinds if isinstance(each, str)),
            class_ids=tuple(each for each in kinds if isinstance(each, int)),
            trace=traced,
            seeds=tuple(order.seed for order in orders),
        )

    def stream(
        self,
        *,
        prompts: Iterable[str] | None = None,
        class_ids: Iterable[int] | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str | None] | None = None,
        **options: Unpack[Requested],
    ) -> Iterator[StreamStep]:
        """Return an iterator that makes one step at a time and yields its StreamStep.

        Arguments are those of `generate`, checked before the first step.
        """
        orders = self._batch(prompts, class_ids, seed, negative_prompt, options)
        self.check(orders)
        inputs = self._inputs(orders)

        def steps() -> Generator[StreamStep]:
            for step in self._play(inputs, len(orders), trace=True):
                yield StreamStep(step.index, step.total, self, step)

        return Steps(self, steps())

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_id: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str | None] | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        callback_on_step_end: "OnStepEnd | None" = None,
        **settings: Unpack[Settings],
    ) -> PipelineOutput:
        """Return images as diffusers' pipelines do: pipe("red apple").images[0].save("x.png").

        Arguments:
            prompt, class_id: one or several, of the kind that this model takes.
            num_images_per_prompt: images for each; the k-th has seed `seed` + k.
            seed: one for all conditions, or a list with one for each image.
            negative_prompt: used instead of guidance's null condition; one, or one per prompt.
            output_type: "pil" pictures, "np" (B, H, W, 3) float32 in [0, 1], or "latent".
            callback_on_step_end: called as callback(pipe, step, timestep, callback_kwargs) with
                the step's number twice; `callback_kwargs` has "latents".
            settings: the model's sampling settings, such as guidance_scale; see `pipe.sampling`.

        Raises ConfigError for a bad request.
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(
                f"output_type {values.shown(output_type)} is not one of {', '.join(OUTPUT_TYPES)}"
            )
        sampling = self.sampling.changed(settings, beside=CALL_ARGUMENTS)
        orders = make_orders(
            sampling,
            prompts=_several("prompt", prompt),
            class_ids=_several("class_id", class_id),
            seed=seed,
            num_images=values.count("num_images_per_prompt", num_images_per_prompt),
            negative=negative_prompt,
            given={},
        )
        return call(self, orders, output_type, callback_on_step_end)

    def _batch(
        self,
        prompts: Iterable[str] | None,
        class_ids: Iterable[int] | None,
        seed: int | Sequence[int],
        negative: str | Sequence[str | None] | None,
        requested: Requested,
        own: tuple[str, ...] = (),
    ) -> list[Order[Sampling]]:
        """Return the orders of one `generate` or `stream`; `own` are further arguments it has."""
        declared, options = self.family.given(self.config), dict(requested)
        given = {name: options.pop(name) for name in declared if name in options}
        beside = ("prompts", "class_ids", "seed", "negative_prompt", *own, *declared)
        return make_orders(
            self.sampling.changed(options, beside=beside),
            prompts=prompts,
            class_ids=class_ids,
            seed=seed,
            negative=negative,
            given={name: array for name, array in given.items() if array is not None},
        )


def _several(name: str, value: Any) -> Any:
    """Return one condition as a list of one; a list or None unchanged.

    ConfigError, naming the argument, for what is neither.
    """
    if isinstance(value, str | int | np.integer):
        return [value]
    if value is not None and (isinstance(value, bytes) or not isinstance(value, Iterable)):
        raise ConfigError(f"{name} must be one or a list of several, not {values.shown(value)}")
    return value


def load_pipeline(
    path: str | Path, backend: str = "auto", **options: Unpack[LoadOptions]
) -> Pipeline:
    """Return the model in `path`: an engine folder, or a checkpoint folder (PyTorch).

    `backend` is "auto" (the fastest that works here; logged with the reason) or a name from
    `nsp.backends.available`. `options` for engines are `precision`, `device`, `num_threads`
    and `verify`, as for `open_engine_dir`; for a checkpoint `device` ("cpu", "cuda", "cuda:1";
    None is the GPU if there is one), `verify` (False accepts files that differ from their
    digests) and `lora` (the folder or file of an adapter, which is merged into the weights).
    Raises ConfigError for other options, and EngineError, CheckpointError or BackendError with
    advice.
    """
    folder, backend = values.path("path", path), values.choice("backend", backend)
    pipeline = _load(folder, backend, options)
    pipeline.origin = Origin(folder.absolute(), backend, dict(options))
    return pipeline


def _checked_options(options: Mapping[str, object]) -> dict[str, Any]:
    """Return the options as Python's own types; ConfigError for a value of a wrong kind."""
    checked = dict(options)
    for name in ("precision", "num_threads", "lora"):
        if checked.get(name) is None:
            checked.pop(name, None)
    if "precision" in checked:
        checked["precision"] = values.choice("precision", checked["precision"])
    if "num_threads" in checked:
        checked["num_threads"] = num_threads(checked["num_threads"])
    if "verify" in checked:
        checked["verify"] = values.flag("verify", checked["verify"])
    return checked


def _load_again(origin: Origin, model_hash: str) -> Pipeline:
    """Return a pipeline that was pickled; CheckpointError if its path has another model now."""
    pipeline = load_pipeline(origin.path, origin.backend, **origin.options)
    if pipeline.model_hash != model_hash:
        raise CheckpointError(
            f"{origin.path} has another model now than when the pipeline was loaded; load it again "
            "with nsp.load_pipeline(path)"
        )
    return pipeline


def _load(folder: Path, backend: str, options: Mapping[str, object]) -> Pipeline:
    """Return the model in `folder`."""
    found = describe(folder)
    checkpoint = found.kind in ("checkpoint", "hub model")
    kind, known = (
        ("a checkpoint", _CHECKPOINT_OPTIONS) if checkpoint else ("engines", _ENGINE_OPTIONS)
    )
    if options.get("lora") is not None and not checkpoint:
        raise ConfigError(merging(folder, values.path("lora", options["lora"])))
    unknown = [n for n, value in options.items() if n not in known and value is not None]
    if unknown:
        raise ConfigError(
            f"{folder} is loaded as {kind}, which has no option {unknown[0]!r}; "
            f"known: {', '.join(known)}"
        )
    options = _checked_options(options)
    if checkpoint:
        if backend not in ("auto", "torch"):
            raise ConfigError(
                f"{folder} is a checkpoint, which only the torch backend can run; "
                f"run: nsp export --checkpoint {folder}"
            )
        return _load_checkpoint(folder, **options)
    if found.kind not in (*NOTHING, "engines"):
        raise EngineError(wrong_path(folder, "model", found))
    if options.get("device") is not None:
        values.choice("device", options["device"])
    engines = open_engine_dir(folder, backend, **options)
    manifest = engines.manifest
    record = engines.family
    return Pipeline(
        record,
        manifest.model_config,
        engines.backend,
        tokenizer=engines.tokenizer,
        sampling=record.sampling.from_dict(manifest.sampling),
        model_hash=manifest.model_hash,
        max_batch=engines.max_batch,
        precision=engines.precision,
    )


def merging(engines: Path, lora: Path) -> str:
    """Return why engines take no adapter, with the command that exports a merged model."""
    words = ["nsp", "export", "--checkpoint", "CHECKPOINT", "--lora", str(lora)]
    words += ["--engine-dir", str(engines)]
    return (
        f"{engines} is loaded as engines, whose weights are built in: an adapter (lora) is for a "
        f"checkpoint; merge it with: {shlex.join(words)}"
    )


def _load_checkpoint(
    folder: Path,
    *,
    device: str | None = None,
    verify: bool = True,
    lora: str | Path | None = None,
) -> Pipeline:
    """Return the PyTorch pipeline of a checkpoint folder, with an adapter merged into it."""
    from nsp.artifacts.checkpoint import read_checkpoint

    record = read_checkpoint(folder, verify=verify)
    system, model_hash = record.load(), record.weights_hash()
    if lora is not None:
        from nsp.weights.adapters import merge_adapter, read_adapter

        adapter = read_adapter(values.path("lora", lora))
        merge_adapter(system, adapter)
        model_hash = hashlib.sha256(f"{model_hash} {adapter.digest}".encode()).hexdigest()
    logger.info("%s: backend torch, because it is a checkpoint", folder)
    pipeline = torch_pipeline(record.family, system, device=device, sampling=record.sampling)
    pipeline.model_hash = model_hash
    return pipeline


def torch_pipeline(
    family: AnyFamily,
    system: "System",
    *,
    kv_layout: str = "delta",
    device: str | None = None,
    sampling: Mapping[str, object] | None = None,
) -> Pipeline:
    """Return a pipeline that runs the modules of `system`, sharing their weights.

    Raises ConfigError for a device torch does not know, BackendError for one it cannot use here.
    """
    import torch

    from nsp.backends.torch import TorchBackend

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = family.learner.modules(system, kv_layout)
    stages_io = family.stages_io(system.config, kv_layout=kv_layout, dtype="float32")
    backend = TorchBackend(stages, stages_io, kv_layout=kv_layout, device=device)
    return Pipeline(
        family,
        system.config,
        backend,
        tokenizer=system.prompt_tokenizer,
        sampling=family.sampling.from_dict(sampling or {}),
    )
