"""The pipeline: prompts or class ids in, images out, from engines or from a checkpoint."""

import logging
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp import values
from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.engines import open_engine_dir
from nsp.cores import num_threads
from nsp.errors import CheckpointError, ConfigError, EngineError
from nsp.family.contract import AnyFamily
from nsp.family.sampling import SamplingConfig
from nsp.paths import NOTHING, describe, wrong_path
from nsp.pipeline.requests import class_numbers, prompt_texts
from nsp.pipeline.results import GenerateResult, StreamStep, Trace, to_uint8
from nsp.stage.arena import Array
from nsp.stage.backend import Backend
from nsp.text.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

# Fields of a family's request that are not given by the caller as arrays.
_NO_ARRAYS = ("sampling", "class_ids", "token_ids", "null_token_ids")
_ENGINE_OPTIONS = ("precision", "device", "num_threads", "verify")


@dataclass(frozen=True)
class Origin:
    """What `load_pipeline` was given: enough to load the same model again in another process."""

    path: Path
    backend: str
    options: Mapping[str, Any]


class _Steps(Iterator[StreamStep]):
    """The scale steps of one request, each made when it is asked for, one at a time."""

    def __init__(self, pipeline: "Pipeline", request: Any) -> None:
        self._pipeline, self._made = pipeline, pipeline.play_scales(request)

    def __next__(self) -> StreamStep:
        """Return the next scale step."""
        with self._pipeline.turn:
            return next(self._made)

    def close(self) -> None:
        """Make no further step; what the backend lent goes back."""
        with self._pipeline.turn:
            self._made.close()


class Pipeline:
    """A loaded model.

    Threads may share one: they take turns, a picture or a scale step at a time, and what each makes
    is what it would make alone. Pickled (sent to another process, copied) it is the path it was
    loaded from with its options, and loads again on the other side.
    """

    def __init__(
        self,
        family: AnyFamily,
        config: Any,
        backend: Backend,
        *,
        tokenizer: PromptTokenizer | None = None,
        sampling: SamplingConfig | None = None,
        model_hash: str = "",
        max_batch: int | None = None,
        precision: str = "fp32",
    ) -> None:
        self.family, self.config, self.backend = family, config, backend
        self.tokenizer = tokenizer
        self.sampling = sampling or SamplingConfig()
        self.model_hash, self.max_batch, self.precision = model_hash, max_batch, precision
        self.turn = threading.RLock()  # held by the thread whose step the backend computes
        self.origin: Origin | None = None
        names = [each.name for each in fields(family.request)]
        self._array_names = [name for name in names if name not in _NO_ARRAYS]

    def __copy__(self) -> "Pipeline":
        """Return another pipeline of the same backend, which both use in turns."""
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
        seed: int = 0,
        trace: bool = False,
        **options: Any,
    ) -> GenerateResult:
        """Return one image per prompt or class id.

        `options` override the model's SamplingConfig (guidance_scale, top_k, top_p, temperature,
        ...) or are arrays of the family's request, in place of those drawn from `seed`: for `var`
        `uniforms` (B, L of all scales), `forced_tokens` (same shape, -1 = free), which replace
        sampled tokens, and `gumbel`; for `next_scale` `noise`. Raises ConfigError for a bad
        request.
        """
        prompts = list(prompts) if isinstance(prompts, Iterator) else prompts  # read twice
        class_ids = list(class_ids) if isinstance(class_ids, Iterator) else class_ids
        trace = values.flag("trace", trace)
        request = self._checked_request(
            prompts=prompts,
            class_ids=class_ids,
            seed=seed,
            **options,
        )
        traced = self._trace(request) if trace else None
        image = self._picture(request) if traced is None else traced.image
        return GenerateResult(
            images=to_uint8(image),
            seed=values.seed(seed),
            prompts=() if prompts is None else self._texts(prompts),
            class_ids=tuple(int(c) for c in (() if class_ids is None else class_ids)),
            trace=traced,
        )

    def stream(
        self,
        *,
        prompts: Iterable[str] | None = None,
        class_ids: Iterable[int] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Iterator[StreamStep]:
        """Return an iterator that makes one scale step at a time and gives its StreamStep.

        Arguments are those of `generate`, checked before the first step.
        """
        request = self._checked_request(prompts=prompts, class_ids=class_ids, seed=seed, **options)
        return _Steps(self, request)

    def _checked_request(
        self,
        *,
        prompts: Iterable[str] | None,
        class_ids: Iterable[int] | None,
        seed: int,
        **options: Any,
    ) -> Any:
        """Return the family's Request; raise ConfigError for what this model does not take."""
        given = {name: options.pop(name) for name in self._array_names if name in options}
        settings, seed = self.sampling.changed(options), values.seed(seed)
        conditions = self._conditions(prompts, class_ids)
        batch = len(next(iter(conditions.values())))
        if self.max_batch is not None and batch > self.max_batch:
            raise ConfigError(
                f"batch of {batch} is outside the engine's 1..{self.max_batch}; "
                f"generate fewer at once or rebuild with --max-batch {batch}"
            )
        arrays = self.random_arrays(settings, seed=seed, batch=batch, given=given)
        return self.family.request(
            sampling=settings, null_token_ids=self._null_prompt(), **conditions, **arrays
        )

    def random_arrays(
        self, settings: SamplingConfig, *, seed: int, batch: int, given: Mapping[str, Any]
    ) -> dict[str, NDArray[Any]]:
        """Return all random numbers of a batch: `given` ones, checked, others drawn from `seed`."""
        chosen = {name: array for name, array in given.items() if array is not None}
        return self.family.request_arrays(
            self.config, settings, seed=seed, batch=batch, given=chosen
        )

    def _texts(self, prompts: Iterable[str]) -> tuple[str, ...]:
        return prompt_texts(prompts, allow_empty=self.family.takes_no_prompt)

    def play_scales(self, request: Any) -> Generator[StreamStep]:
        """Yield the scale steps of a checked request; whoever asks for one holds `turn`."""
        for step in self.backend.play("scales", self._host(request), self._scales):
            tokens = None if step.tokens is None else self.backend.download(step.tokens)
            yield StreamStep(step.scale, step.num_scales, tokens, self, step)

    def _picture(self, request: Any) -> NDArray[np.float32]:
        """Return the picture alone: from condition to decoder in one piece, nothing in between."""
        with self.turn:
            (image,) = self.backend.play("picture", self._host(request), self._scales_and_decoder)
            return self.backend.download(image)

    def _trace(self, request: Any) -> Trace:
        tokens, logits, latents, last = [], [], [], None
        for last in _Steps(self, request):
            latents.append(last.latent)
            if last.has_tokens:
                tokens.append(last.tokens)
                logits.append(last.logits)
        assert last is not None  # a schedule has at least one scale
        return Trace(tokens, logits, latents, last.decode())

    def _host(self, request: Any) -> dict[str, NDArray[Any]]:
        return self.family.inputs(self.config, request)

    def _scales(self, backend: Backend, inputs: Mapping[str, Array]) -> Iterator[Any]:
        return self.family.loop(backend, self.config, inputs)

    def _scales_and_decoder(self, backend: Backend, inputs: Mapping[str, Array]) -> Iterator[Array]:
        last: Any = None
        for step in self.family.loop(backend, self.config, inputs):
            last = step
        yield backend.run("decoder", {"latent": last.latent})["image"]

    def _conditions(
        self, prompts: Iterable[str] | None, class_ids: Iterable[int] | None
    ) -> dict[str, NDArray[np.int64]]:
        """Return the request's condition arrays.

        Raises ConfigError for what this model does not take.
        """
        if self.tokenizer is not None:
            texts = () if prompts is None else self._texts(prompts)
            if class_ids is not None:
                raise ConfigError("this model is text-conditional: it takes prompts, no class ids")
            if not texts:
                raise ConfigError("this model is text-conditional: give one or more prompts")
            with self.turn:
                return {"token_ids": self.tokenizer.encode(texts)}
        ids = class_numbers(() if class_ids is None else class_ids)
        if prompts is not None:
            raise ConfigError("this model is class-conditional: it takes class ids, no prompts")
        if not len(ids):
            raise ConfigError("this model is class-conditional: give one or more class ids")
        count = self.config.num_classes
        if bad := [int(i) for i in ids if not 0 <= i <= count]:
            raise ConfigError(
                f"class id {bad[0]} is outside 0..{count - 1} ({count} is the null class)"
            )
        return {"class_ids": ids}

    def _null_prompt(self) -> NDArray[np.int64] | None:
        if self.tokenizer is None:
            return None
        with self.turn:
            return self.tokenizer.encode([""])

    def decode(self, latent: Any) -> NDArray[np.float32]:
        """Return the picture (B, 3, H, W) in [0, 1] of a latent on the backend."""
        with self.turn:
            image = self.backend.run("decoder", {"latent": latent})["image"]
            return self.backend.download(image)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a NumPy copy of an array of the backend."""
        with self.turn:
            return self.backend.download(array)


def load_pipeline(path: str | Path, backend: str = "auto", **options: Any) -> Pipeline:
    """Return the model in `path`: an engine folder, or a checkpoint folder (PyTorch).

    `backend` is "auto" (the fastest that works here; logged with the reason) or a name from
    `nsp.backends.available`. `options` of engines are `precision`, `device`, `num_threads`
    and `verify`, as for `open_engine_dir`; a checkpoint has `device` ("cpu", "cuda", "cuda:1";
    None is the GPU where there is one) and `verify` (False takes files that differ from their
    digests). Raises ConfigError for another one, and EngineError,
    CheckpointError or BackendError with what to do.
    """
    folder, backend = values.path("path", path), values.choice("backend", backend)
    pipeline = _load(folder, backend, options)
    pipeline.origin = Origin(folder.absolute(), backend, dict(options))
    return pipeline


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with Python's own values; ConfigError for one of a wrong kind."""
    checked = dict(options)
    for name in ("precision", "num_threads"):
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
    """Return a pipeline that was pickled; CheckpointError when another model lies there now."""
    pipeline = load_pipeline(origin.path, origin.backend, **origin.options)
    if pipeline.model_hash != model_hash:
        raise CheckpointError(
            f"{origin.path} holds another model than the pipeline that was sent here was loaded "
            "from; load it again with nsp.load_pipeline(path)"
        )
    return pipeline


def _load(folder: Path, backend: str, options: Mapping[str, Any]) -> Pipeline:
    """Return the model in `folder`."""
    found = describe(folder)
    checkpoint = found.kind in ("checkpoint", "hub model")
    kind, known = (
        ("a checkpoint", ("device", "verify")) if checkpoint else ("engines", _ENGINE_OPTIONS)
    )
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(
            f"{folder} is loaded as {kind}, which has no option {unknown[0]!r}; "
            f"it has {', '.join(known)}"
        )
    options = _checked_options(options)
    if checkpoint:
        if backend not in ("auto", "torch"):
            raise ConfigError(
                f"{folder} is a checkpoint, which only the torch backend runs; "
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
        record.config.from_dict(manifest.config),
        engines.backend,
        tokenizer=engines.tokenizer,
        sampling=SamplingConfig.from_dict(manifest.sampling),
        model_hash=manifest.model_hash,
        max_batch=engines.max_batch,
        precision=engines.precision,
    )


def _load_checkpoint(folder: Path, *, device: str | None = None, verify: bool = True) -> Pipeline:
    """Return the PyTorch pipeline of a checkpoint folder."""
    record = read_checkpoint(folder, verify=verify)
    logger.info("%s: backend torch, because it is a checkpoint", folder)
    pipeline = torch_pipeline(record.family, record.load(), device=device, sampling=record.sampling)
    pipeline.model_hash = record.weights_hash()
    return pipeline


def torch_pipeline(
    family: AnyFamily,
    system: Any,
    *,
    kv_layout: str = "delta",
    device: str | None = None,
    sampling: Mapping[str, Any] | None = None,
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
        sampling=SamplingConfig.from_dict(sampling or {}),
    )
