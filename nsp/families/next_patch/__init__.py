"""The family `next_patch`: raster codes of an image, trained by next-patch prediction.

Source: LlamaGen (Sun et al. 2024, arXiv:2406.06525) and Next Patch Prediction (Pang et al. 2024,
arXiv:2412.15321), which changes the training alone.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nsp.families.next_patch.config import SIZES, NextPatchConfig, with_classes
from nsp.families.next_patch.peers import PUBLIC_LLAMAGEN
from nsp.families.next_patch.stages import stages
from nsp.family.classes import ClassCondition
from nsp.family.contract import Family, Kind, Learner, Stage
from nsp.family.order import Encoded, Given, Order, Step
from nsp.family.peer import Peer
from nsp.raster import loop
from nsp.raster.examples import examples
from nsp.raster.sampling import RasterSampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.next_patch.system import NextPatchSystem
    from nsp.family.recipe import RunConfig
    from nsp.stage.arena import Array, KVShape
    from nsp.stage.backend import Backend


class NextPatch(Family[NextPatchConfig, RasterSampling, "NextPatchSystem"]):
    """LlamaGen and models trained by next-patch prediction, with classes or captions."""

    name: ClassVar[str] = "next_patch"
    kv_layouts: ClassVar[tuple[str, ...]] = ("delta", "fixed", "in_place")
    published: ClassVar[Mapping[str, str]] = {
        "tokenizer": "Weights of the image tokenizer.",
        "predictor": "Weights of the transformer.",
    }
    published_folders: ClassVar[Mapping[str, str]] = {
        "text-encoder": "T5 folder, for models of captions.",
    }
    peers: ClassVar[Sequence[Peer]] = (PUBLIC_LLAMAGEN,)
    config, sampling, sizes = NextPatchConfig, RasterSampling, SIZES

    def condition(self, config: NextPatchConfig) -> Kind:
        """Return the kind of condition for a picture."""
        return "class" if config.caption is None else "prompt"

    def grids(self, config: NextPatchConfig) -> Sequence[tuple[int, int]]:
        """Return the one grid of codes."""
        return [(config.grid_side, config.grid_side)]

    def cache(self, config: NextPatchConfig, rows: int, dtype: str) -> "KVShape":
        """Return the size of the key/value cache of one batch."""
        return config.grid.cache(rows, dtype)

    def layouts(self, config: NextPatchConfig) -> tuple[str, ...]:
        """Return the cache layouts that a model of this configuration can have."""
        return config.grid.layouts(self.kv_layouts)

    def stages(self, config: NextPatchConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order."""
        return stages(config, kv_layout, dtype)

    def given(self, config: NextPatchConfig) -> Mapping[str, Given]:
        """Return what an order may carry: random numbers and codes."""
        return loop.given(config.grid)

    def batch_key(self, config: NextPatchConfig, order: Order[RasterSampling]) -> Hashable:
        """Return what decides shapes and control flow."""
        return loop.batch_key(config.grid, order)

    def inputs(
        self,
        config: NextPatchConfig,
        orders: Sequence[Order[RasterSampling]],
        text: Encoded | None,
    ) -> "dict[str, NDArray[Any]]":
        """Return all that the loop takes from the host."""
        found = loop.loop_inputs(config.grid, orders)
        guided = len(found["rows"]) > len(orders)
        if text is None:
            ids = np.array([order.condition for order in orders], np.int64)
            null = np.full_like(ids, config.num_classes)
            classes = np.concatenate([ids, null]) if guided else ids
            return {**found, "token": config.vq.codebook_size + classes}
        prompts = np.arange(len(orders), dtype=np.int64)
        padding = (text.mask == 0).sum(1)  # on the left
        first = padding[: len(orders)]
        if guided:  # the learned null condition has the padding of its image's prompt
            null = text.null_rows()
            own = np.where(text.has_null, padding[np.minimum(null, len(padding) - 1)], first)
            prompts, first = np.concatenate([prompts, null]), np.concatenate([first, own])
        return {**found, **text.states, "prompts": prompts, "first": first}

    def loop(
        self, backend: "Backend", config: NextPatchConfig, inputs: "Mapping[str, Array]"
    ) -> Iterator[Step]:
        """Yield one Step per row of codes."""
        if config.caption is None:
            return loop.draw_codes(backend, config.grid, inputs, carried={})
        prefix = {name: inputs[name] for name in ("text_states", "prompts", "first")}
        carried = {"first": inputs["first"]}
        return loop.draw_codes(backend, config.grid, inputs, carried=carried, prefix=prefix)

    def examples(
        self, config: NextPatchConfig, sampling: RasterSampling
    ) -> Sequence[Sequence[Order[RasterSampling]]]:
        """Return batches of orders that together call every stage."""
        classes = config.num_classes if isinstance(config.condition, ClassCondition) else None
        return examples(config.grid, sampling, num_classes=classes)

    @property
    def recipes(self) -> "Mapping[str, Callable[..., RunConfig]]":
        """Named training runs."""
        from nsp.families.next_patch.recipes import RECIPES

        return RECIPES

    def with_classes(self, config: NextPatchConfig, names: Sequence[str]) -> NextPatchConfig:
        """Return `config` for pictures of these classes."""
        return with_classes(config, names)

    def class_names(self, config: NextPatchConfig) -> Sequence[str]:
        """Return the names of a model's classes by their numbers; empty if it has none."""
        condition = config.condition
        return condition.id2label if isinstance(condition, ClassCondition) else ()

    def convert(
        self, files: Mapping[str, Path], config: Mapping[str, Any] | None, output_dir: Path
    ) -> None:
        """Write the checkpoint folder `output_dir` from the weights of LlamaGen."""
        from nsp.families.next_patch.published import convert

        parts = {name.replace("-", "_"): path for name, path in files.items()}
        convert(**parts, config=config, output_dir=output_dir)

    def adopt(self, config: NextPatchConfig, trained: NextPatchConfig) -> NextPatchConfig:
        """Return `config` with the condition of the trained model."""
        return dataclasses.replace(
            config, condition=trained.condition, pretrained_vq=None, pretrained_gpt=None
        )

    @property
    def learner(self) -> "Learner[NextPatchConfig, RasterSampling, NextPatchSystem]":
        """The part that needs torch."""
        from nsp.families.next_patch.learn import NextPatchLearner

        return NextPatchLearner()
