"""The family `latent_gpt`: VQGAN codes drawn in raster order by GPT-2 that reads CLIP's states.

Source: github.com/ShlomiRex/final_project; what it leaves open or gets wrong is settled in
docs/latent_gpt.md.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nsp.families.latent_gpt.config import SIZES, LatentGptConfig
from nsp.families.latent_gpt.stages import stages
from nsp.family.contract import Family, Kind, Learner, Stage
from nsp.family.order import Encoded, Given, Order, Step
from nsp.raster import loop
from nsp.raster.examples import examples
from nsp.raster.sampling import RasterSampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.latent_gpt.system import LatentGptSystem
    from nsp.family.recipe import RunConfig
    from nsp.stage.arena import Array, KVShape
    from nsp.stage.backend import Backend


class LatentGpt(Family[LatentGptConfig, RasterSampling, "LatentGptSystem"]):
    """GPT-2 over VQGAN codes, with prompts or without."""

    name: ClassVar[str] = "latent_gpt"
    kv_layouts: ClassVar[tuple[str, ...]] = ("delta", "fixed", "in_place")
    published: ClassVar[Mapping[str, str]] = {
        "tokenizer": "Weights of the image tokenizer.",
    }
    draws_without_prompt: ClassVar[bool] = True
    config, sampling, sizes = LatentGptConfig, RasterSampling, SIZES

    def condition(self, config: LatentGptConfig) -> Kind:
        """Return the kind of condition for a picture."""
        return "none" if config.text is None else "prompt"

    def grids(self, config: LatentGptConfig) -> Sequence[tuple[int, int]]:
        """Return the one grid of codes."""
        return [(config.grid_side, config.grid_side)]

    def cache(self, config: LatentGptConfig, rows: int, dtype: str) -> "KVShape":
        """Return the size of the key/value cache of one batch."""
        return config.grid.cache(rows, dtype)

    def layouts(self, config: LatentGptConfig) -> tuple[str, ...]:
        """Return the cache layouts that a model of this configuration can have."""
        return config.grid.layouts(self.kv_layouts)

    def stages(self, config: LatentGptConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order."""
        return stages(config, kv_layout, dtype)

    def given(self, config: LatentGptConfig) -> Mapping[str, Given]:
        """Return what an order may carry: random numbers and codes."""
        return loop.given(config.grid)

    def batch_key(self, config: LatentGptConfig, order: Order[RasterSampling]) -> Hashable:
        """Return what decides shapes and control flow."""
        return loop.batch_key(config.grid, _guided_if_possible(config, order))

    def inputs(
        self,
        config: LatentGptConfig,
        orders: Sequence[Order[RasterSampling]],
        text: Encoded | None,
    ) -> "dict[str, NDArray[Any]]":
        """Return all that the loop takes from the host.

        Images without a prompt look at the stored null prompt, which needs no text encoder.
        """
        found = loop.loop_inputs(config.grid, [_guided_if_possible(config, o) for o in orders])
        num_rows, batch = len(found["rows"]), len(orders)
        found["token"] = np.full(num_rows, config.bos)
        if config.text is None:
            return found
        if text is None:
            shape = (batch, config.text.max_tokens, config.text.text_width)
            states, null = {"text_states": np.zeros(shape, np.float32)}, np.full(batch, batch)
        else:
            states, null = dict(text.states), text.null_rows()
        stored = len(states["text_states"])
        has_prompt = np.array([order.condition is not None for order in orders])
        prompts = np.where(has_prompt, np.arange(batch), stored)
        rows = prompts if num_rows == batch else np.concatenate([prompts, null])
        return {**found, **states, "prompts": rows}

    def loop(
        self, backend: "Backend", config: LatentGptConfig, inputs: "Mapping[str, Array]"
    ) -> Iterator[Step]:
        """Yield one Step per row of codes."""
        carried: Mapping[str, Array] = {}
        if config.text is not None:
            feeds = {name: inputs[name] for name in ("text_states", "prompts")}
            carried = backend.run("condition", feeds)
        yield from loop.draw_codes(backend, config.grid, inputs, carried=carried)

    def examples(
        self, config: LatentGptConfig, sampling: RasterSampling
    ) -> Sequence[Sequence[Order[RasterSampling]]]:
        """Return batches of orders that together call every stage; one of them has no prompt."""
        has_text = config.text is not None
        made = examples(config.grid, sampling, num_classes=None, prompts=has_text)
        return [*made, [Order(None, len(made), sampling)]] if has_text else made

    @property
    def recipes(self) -> "Mapping[str, Callable[..., RunConfig]]":
        """Named training runs."""
        from nsp.families.latent_gpt.recipes import RECIPES

        return RECIPES

    @property
    def run_options(self) -> "Callable[..., RunConfig]":
        """The options for a run from a file or a stopped run."""
        from nsp.families.latent_gpt.recipes import adapted

        return adapted

    def adopt(self, config: LatentGptConfig, trained: LatentGptConfig) -> LatentGptConfig:
        """Return `config` with the tokenizer and the text condition of the trained model."""
        return replace(
            config,
            grid_side=trained.grid_side,
            vq=trained.vq,
            pretrained_vq=None,
            text=trained.text,
        )

    def convert(
        self, files: Mapping[str, Path], config: Mapping[str, object] | None, output_dir: Path
    ) -> None:
        """Write a checkpoint folder with a published tokenizer and a new transformer."""
        from nsp.families.latent_gpt.learn import convert

        convert(files["tokenizer"], config or {}, output_dir)

    @property
    def learner(self) -> "Learner[LatentGptConfig, RasterSampling, LatentGptSystem]":
        """The part that needs torch."""
        from nsp.families.latent_gpt.learn import LatentGptLearner

        return LatentGptLearner()


def _guided_if_possible(
    config: LatentGptConfig, order: Order[RasterSampling]
) -> Order[RasterSampling]:
    """Return the order without guidance if both of its branches would be the same."""
    same = order.condition is None and order.negative is None
    if config.text is not None and not same:
        return order
    unguided = replace(order.sampling, guidance_scale=1.0, cfg_interval=-1)
    return replace(order, sampling=unguided)
