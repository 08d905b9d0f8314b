"""The contract of a model family: one class, and one record per stage, without torch.

A family is in one folder, `nsp/families/NAME/`, or in its own package: the class in `__init__.py`,
its configuration, stages and loop next to it, and everything that needs torch behind `learner`. The
rest of the package knows families only through this file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from nsp.config import ModelConfig
from nsp.errors import ConfigError
from nsp.family.gate import RANGE, Gate
from nsp.family.order import Encoded, Given, Order, S, Step
from nsp.family.peer import Peer
from nsp.stage.io import Sizes, StageIO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from nsp.data.dataset import ImageDataset
    from nsp.data.sources import ImageSource
    from nsp.data.ten_crop import Extraction
    from nsp.family.objective import Objective, TrainingData
    from nsp.family.recipe import RunConfig
    from nsp.family.system import System
    from nsp.stage.arena import Array, KVShape
    from nsp.stage.backend import Backend
    from nsp.text.encoder import TextModel
    from nsp.text.parts import TextEncoderSettings
    from nsp.text.tokenizer import PromptTokenizer

API = 1  # version of this contract; plugins for other versions are left out with a warning

Span: TypeAlias = Mapping[str, int | tuple[int, int]]  # one size, or smallest and largest
Kind: TypeAlias = Literal["prompt", "class", "none"]
C = TypeVar("C", bound=ModelConfig)  # the configuration of its models
Y = TypeVar("Y", bound="System")  # the modules of one model, with torch

# Sizes of the reserved axes for tracing graphs: all different and at least 2, since 0 and 1 would
# become constants; rows G must not be fewer than images B. A family's own axes get further sizes.
_TRACED: Sizes = {"B": 3, "G": 6, "N": 4, "R": 7}
_FIRST_OWN = 9


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The whole declaration of one stage.

    These axes mean the same in every family: B images, G rows (the images, then their null rows),
    N encoded prompts, R ranks of the logits that top-k and top-p use. All other axes belong to the
    family.
    """

    io: StageIO
    # Weights, as patterns of parameter names ("predictor.blocks.*.ffn.fc1.*"). A stage without
    # `half` weights is the same in fp32, fp16 and bf16.
    half: tuple[str, ...] = ()  # these get the precision of the export
    int8: tuple[str, ...] = ()  # those of `half` that an int8 export quantizes
    full: tuple[str, ...] = ()  # these stay float32
    # The family's own axes, one engine profile each, as one size or (smallest, largest); an export
    # adds the reserved ones.
    spans: tuple[Span, ...] = ({},)
    max_ranks: int = 1  # largest R: the number of codes
    gate: Gate = RANGE  # the condition for an export of it to be correct

    def profiles(
        self, *, max_batch: int, static_batch: bool, best_ranks: int, max_ranks: int
    ) -> tuple[Sequence[Sizes], ...]:
        """Return the engine profiles: the sizes that each one covers, the best one last.

        Batches of 1 to `max_batch` images fit, with guidance (G = 2B rows) or without (G = B), and
        a null prompt for every image; with `static_batch` only full ones with guidance do. R goes
        up to `max_ranks` and is best at `best_ranks`.
        """
        most_ranks = min(max_ranks, self.max_ranks)
        high = {"B": max_batch, "G": 2 * max_batch, "N": 2 * max_batch, "R": most_ranks}
        low = {"B": 1, "G": 1, "N": 1, "R": 1}
        if static_batch:
            low |= {"B": high["B"], "G": high["G"]}
        best = {**high, "N": max_batch, "R": min(best_ranks, most_ranks)}
        found = []
        for span in self.spans:
            ends = [
                {n: s if isinstance(s, int) else s[end] for n, s in span.items()} for end in (0, 1)
            ]
            found.append([{**low, **ends[0]}, {**high, **ends[1]}, {**best, **ends[1]}])
        return tuple(found)


def trace_sizes(stages: Mapping[str, Stage]) -> Sizes:
    """Return a different size for every free axis of a family's stages, for tracing graphs."""
    own = dict.fromkeys(axis for stage in stages.values() for axis in stage.io.free_axes)
    names = [axis for axis in own if axis not in _TRACED]
    return {**_TRACED, **{axis: _FIRST_OWN + number for number, axis in enumerate(names)}}


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights of the user's that a new model begins with; their phase need not be trained."""

    option: str  # of the family's recipes, such as "vq_ckpt"
    field: str  # of the model's configuration: the path of a file or folder, or None
    phase: str


class Learner(ABC, Generic[C, S, Y]):
    """The side of a family that needs torch."""

    parts: ClassVar[tuple[str, ...]]  # of the system, each stored as a folder of weights

    @abstractmethod
    def build(
        self,
        config: C,
        *,
        text_encoder: "TextModel | None",
        prompt_tokenizer: "PromptTokenizer | None",
    ) -> Y:
        """Return a system whose weights will be loaded."""

    def new_system(
        self, config: C, text_encoder: "TextEncoderSettings", source: "ImageSource | None"
    ) -> Y:
        """Return a freshly initialised system; weights are drawn from torch's global generator.

        A family without prompts and pretrained files need not implement it.
        """
        return self.build(config, text_encoder=None, prompt_tokenizer=None)

    def untrained(self, config: C) -> Y:
        """Return a system of random weights that is as hard to run and export as a trained one.

        `nsp bench` measures sizes with it for which there are no weights. Weights are drawn from
        torch's global generator. A family whose initialisation hides parts of the model, closed
        gates for example, opens them here.
        """
        from nsp.text.parts import TextEncoderSettings

        return self.new_system(config, TextEncoderSettings(), None)

    @abstractmethod
    def modules(self, system: Y, kv_layout: str) -> "Mapping[str, nn.Module]":
        """Return a module for every declared stage, sharing the weights of `system`."""

    @abstractmethod
    def objective(
        self,
        phase: str,
        settings: Mapping[str, object],
        system: Y,
        data: "TrainingData",
    ) -> "Objective":
        """Return the objective of a phase; raise ConfigError for an unknown one."""

    def without_cache(
        self,
        system: Y,
        orders: Sequence[Order[S]],
        tokens: "Sequence[NDArray[np.int64]]",
        latents: "Sequence[NDArray[np.float32]]",
    ) -> "Sequence[NDArray[np.float32]]":
        """Return the result of every step of unguided orders, from one pass as in training.

        The result is logits (B, L, V) for the `tokens` (B, L) of every step if tokens are drawn,
        otherwise the latents. A family with a cache implements it, to compare the two ways.
        """
        raise ConfigError("this family cannot check its cache: it does not implement without_cache")

    def reconstruct(self, system: Y, pictures_BHW3: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        """Return uint8 pictures (B, H, W, 3) as the image tokenizer reconstructs them."""
        raise ConfigError(
            f"family {system.family} has no image tokenizer that could reconstruct pictures"
        )

    def write_cache(self, system: Y, data: "ImageDataset", file: Path) -> None:
        """Write the image tokenizer's output for the pictures, for later runs."""
        raise ConfigError(
            f"family {system.family} has no image tokenizer: it trains on the pictures themselves, "
            "so there is nothing to cache"
        )

    def write_codes(
        self, system: Y, source: "ImageSource", folder: Path, settings: "Extraction"
    ) -> int:
        """Write codes of crops of pictures to a folder; return of how many they were missing."""
        raise ConfigError(f"family {system.family} cannot train on folders of codes")


class Family(ABC, Generic[C, S, Y]):
    """One model family; an instance has no state."""

    api: ClassVar[int] = API
    name: ClassVar[str]
    kv_layouts: ClassVar[tuple[str, ...]] = ("delta", "present")  # its cache's layouts, best first
    published: ClassVar[Mapping[str, str]] = {}  # the files that `convert` takes, and their help
    published_folders: ClassVar[Mapping[str, str]] = {}  # the folders that some models need beside
    pretrained: ClassVar[Sequence[Pretrained]] = ()
    peers: ClassVar[Sequence[Peer]] = ()  # public code that `nsp bench` can time beside it
    default_prompt: ClassVar[str | None] = None  # for `nsp generate`
    default_seed: ClassVar[int] = 0
    default_batch_size: ClassVar[int | None] = None  # None: the best number for the engines
    takes_no_prompt: ClassVar[bool] = False  # "" stands for no prompt
    # An order of a model with prompts may have none at all; it then needs no text encoder.
    draws_without_prompt: ClassVar[bool] = False
    # `--batch-size N` without `--num-images` makes N images, as its first implementation does.
    batch_is_images: ClassVar[bool] = False
    config: type[C]
    sampling: type[S]

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, C]:
        """Named models; one is "tiny"."""

    @abstractmethod
    def condition(self, config: C) -> Kind:
        """Return the kind of condition for a picture."""

    @abstractmethod
    def grids(self, config: C) -> Sequence[tuple[int, int]]:
        """Return the (h, w) grids of latents that can be decoded, the final one last."""

    def cache(self, config: C, rows: int, dtype: str) -> "KVShape | None":
        """Return the size of the key/value cache of one batch; None for a model without one."""
        return None

    @abstractmethod
    def stages(self, config: C, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order; `dtype` is that of keys and values."""

    def stages_io(self, config: C, *, kv_layout: str, dtype: str) -> dict[str, StageIO]:
        """Return the tensors of every stage."""
        stages = self.stages(config, kv_layout=kv_layout, dtype=dtype)
        return {name: stage.io for name, stage in stages.items()}

    def layouts(self, config: C) -> tuple[str, ...]:
        """Return the cache layouts that a model of this configuration can have, best first."""
        return self.kv_layouts

    def layout(self, wanted: Sequence[str], config: C | None = None) -> str:
        """Return the first of the cache layouts that the family has, or else the family's best.

        With a configuration, only those count that its model can have.
        """
        known = self.kv_layouts if config is None else self.layouts(config)
        return next((each for each in wanted if each in known), known[0])

    def given(self, config: C) -> Mapping[str, Given]:
        """Return the arrays that an order may have in addition to its condition."""
        return {}

    def null_prompt(self, config: C, order: Order[S]) -> str | None:
        """Return the prompt used as an order's null condition; None if the null is learned."""
        return order.negative

    def batch_key(self, config: C, order: Order[S]) -> Hashable:
        """Return the settings that decide shapes and control flow; equal keys may share a batch.

        The names and shapes of an order's given arrays are also part of it. Raises ConfigError for
        settings that this model does not have. The default is for models whose orders all take the
        same steps.
        """
        return ()

    @abstractmethod
    def inputs(
        self, config: C, orders: Sequence[Order[S]], text: Encoded | None
    ) -> "dict[str, NDArray[Any]]":
        """Return all inputs of the loop from the host, for a batch of orders with equal keys.

        The work of the loop depends only on their names and shapes, so that it can be recorded.
        """

    @abstractmethod
    def loop(self, backend: "Backend", config: C, inputs: "Mapping[str, Array]") -> Iterator[Step]:
        """Yield the steps of one batch."""

    @abstractmethod
    def examples(self, config: C, sampling: S) -> Sequence[Sequence[Order[S]]]:
        """Return batches of orders that together call every stage, for parity and tests.

        `sampling` are the model's own settings.
        """

    @property
    @abstractmethod
    def recipes(self) -> "Mapping[str, Callable[..., RunConfig]]":
        """Named training runs; their keywords are options of `train.py` (see signature.py)."""

    @property
    def run_options(self) -> "Callable[..., RunConfig] | None":
        """The options for a run from a file or a stopped run: a function of it and keywords."""
        return None

    def options_of(self, run: Mapping[str, object]) -> "Callable[..., RunConfig] | None":
        """Return `run_options` for one run, as a dictionary that may be incomplete.

        A family whose recipes have options, or variables, that its other runs have not decides by
        the run.
        """
        return self.run_options

    def with_classes(self, config: C, names: Sequence[str]) -> C:
        """Return `config` for pictures of these classes; the number of a class is its index."""
        return config

    def class_names(self, config: C) -> Sequence[str]:
        """Return the names of a model's classes by their numbers; empty if it has none."""
        return ()

    def sample_name(
        self, config: C, sampling: S, *, model: str, size_px: int, size_eval_px: int, seed: int
    ) -> str:
        """Return the name of an archive of this model's pictures, without its ending.

        `model` is the name of the model's folder, `size_eval_px` the side of the pictures after
        resizing. The default has the settings that are not the family's defaults. A family whose
        first implementation composes a name does it in the same way.
        """
        usual = self.sampling().to_dict()
        own = {n: each for n, each in sampling.to_dict().items() if each != usual[n]}
        settings = "".join(f"{name}-{each}-" for name, each in own.items())
        return f"{self.name}-{model}-size-{size_px}-size-{size_eval_px}-{settings}seed-{seed}"

    def adopt(self, config: C, trained: C) -> C:
        """Return `config` with values from trained parts, such as a text encoder's width."""
        return config

    def convert(
        self, files: Mapping[str, Path], config: Mapping[str, object] | None, output_dir: Path
    ) -> None:
        """Write a checkpoint folder from published weights, the files named in `published`."""
        raise ConfigError(f"family {self.name} has no published weights; train a model instead")

    @property
    @abstractmethod
    def learner(self) -> Learner[C, S, Y]:
        """The part that needs torch: new systems, modules of the stages, objectives."""


# The only alias: a caller with the name of a family cannot know its configuration type.
AnyFamily: TypeAlias = Family[Any, Any, Any]
