"""The family `latent_gpt`: VQGAN codes drawn in raster order by GPT-2 that reads CLIP's states.

Source: github.com/ShlomiRex/final_project; what it leaves open or gets wrong is settled in
docs/latent_gpt.md.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nsp.families.latent_gpt.config import SIZES, LatentGptConfig
from nsp.families.latent_gpt.stages import stages
from nsp.family.contract import Kind, Learner, Pretrained, Stage
from nsp.family.order import Encoded, Order, Step
from nsp.raster import loop
from nsp.raster.examples import examples
from nsp.raster.sampling import RasterSampling
from nsp.raster.shared_family import RasterFamily

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.latent_gpt.system import LatentGptSystem
    from nsp.family.recipe import RunConfig
    from nsp.stage.arena import Array
    from nsp.stage.backend import Backend


class LatentGpt(RasterFamily[LatentGptConfig, "LatentGptSystem"]):
    """GPT-2 over VQGAN codes, with prompts or without."""

    name: ClassVar[str] = "latent_gpt"
    published: ClassVar[Mapping[str, str]] = {
        "tokenizer": "Weights of the image tokenizer.",
    }
    pretrained: ClassVar[Sequence[Pretrained]] = (
        Pretrained(option="vqvae", field="pretrained_vq", phase="tokenizer"),
    )
    config, sizes = LatentGptConfig, SIZES

    def condition(self, config: LatentGptConfig) -> Kind:
        """Return the kind of condition for a picture."""
        return "none" if config.text is None else "prompt"

    def stages(self, config: LatentGptConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order."""
        return stages(config, kv_layout, dtype)

    def inputs(
        self,
        config: LatentGptConfig,
        orders: Sequence[Order[RasterSampling]],
        text: Encoded | None,
    ) -> "dict[str, NDArray[Any]]":
        """Return all that the loop takes from the host.

        Images without a prompt read the stored null prompt, which needs no text encoder.
        """
        found = loop.loop_inputs(config.grid, orders)
        num_rows = len(found["rows"])
        found["token"] = np.full(num_rows, config.bos)
        if config.text is None:
            return found
        return found | loop.prompt_inputs(
            orders,
            text,
            num_rows=num_rows,
            num_tokens=config.text.max_tokens,
            width=config.text.text_width,
        )

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
        return examples(config.grid, sampling, num_classes=None, prompts=has_text)

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
        from nsp.artifacts.checkpoint import check_new_checkpoint
        from nsp.families.latent_gpt.learn import convert

        check_new_checkpoint(output_dir)
        convert(files["tokenizer"], config or {}, output_dir)

    @property
    def learner(self) -> "Learner[LatentGptConfig, RasterSampling, LatentGptSystem]":
        """The part that needs torch."""
        from nsp.families.latent_gpt.learn import LatentGptLearner

        return LatentGptLearner()
