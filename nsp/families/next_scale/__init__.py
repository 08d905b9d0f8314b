"""The family `next_scale`: latents grow scale by scale, each a residual over the one before."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nsp.families.next_scale.config import SIZES, NextScaleConfig
from nsp.families.next_scale.loop import batch_key, cache, generate, given, loop_inputs
from nsp.families.next_scale.sampling import NextScaleSampling
from nsp.families.next_scale.stages import stages
from nsp.family.contract import Family, Kind, Learner, Stage
from nsp.family.order import Encoded, Given, Order, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.next_scale.system import NextScaleSystem
    from nsp.family.recipe import RunConfig
    from nsp.stage.arena import Array, KVShape
    from nsp.stage.backend import Backend


class NextScale(Family[NextScaleConfig, NextScaleSampling, "NextScaleSystem"]):
    """Continuous latents from a small flow, enlarged by predictors that share a cache."""

    name: ClassVar[str] = "next_scale"
    kv_layouts: ClassVar[tuple[str, ...]] = ("delta",)
    default_prompt: ClassVar[str | None] = "a beautiful landscape with mountains and a lake"
    default_seed: ClassVar[int] = 42
    default_batch_size: ClassVar[int | None] = 1
    takes_no_prompt: ClassVar[bool] = True
    batch_is_images: ClassVar[bool] = True
    config, sampling, sizes = NextScaleConfig, NextScaleSampling, SIZES

    def condition(self, config: NextScaleConfig) -> Kind:
        """Return the kind of condition for a picture."""
        return "prompt"

    def grids(self, config: NextScaleConfig) -> Sequence[tuple[int, int]]:
        """Return the grid of every latent."""
        return [(side, side) for side in config.sides]

    def cache(self, config: NextScaleConfig, rows: int, dtype: str) -> "KVShape":
        """Return the size of the key/value cache of one batch."""
        return cache(config, rows, dtype)

    def stages(self, config: NextScaleConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order; the decoder has one profile per scale."""
        return stages(config, kv_layout, dtype)

    def given(self, config: NextScaleConfig) -> Mapping[str, Given]:
        """Return the arrays that an order may have: the noise of the first latent."""
        return given(config)

    def batch_key(self, config: NextScaleConfig, order: Order[NextScaleSampling]) -> Hashable:
        """Return the settings that decide shapes and control flow."""
        return batch_key(config, order)

    def inputs(
        self,
        config: NextScaleConfig,
        orders: Sequence[Order[NextScaleSampling]],
        text: Encoded | None,
    ) -> "dict[str, NDArray[Any]]":
        """Return all inputs of the loop from the host."""
        assert text is not None  # its models read prompts
        return loop_inputs(config, orders, text)

    def loop(
        self, backend: "Backend", config: NextScaleConfig, inputs: "Mapping[str, Array]"
    ) -> Iterator[Step]:
        """Yield one Step per scale."""
        return generate(backend, config, inputs)

    def examples(
        self, config: NextScaleConfig, sampling: NextScaleSampling
    ) -> Sequence[Sequence[Order[NextScaleSampling]]]:
        """Return batches of orders that together call every stage."""
        from nsp.families.next_scale.examples import examples

        return examples(sampling)

    @property
    def recipes(self) -> "Mapping[str, Callable[..., RunConfig]]":
        """Named training runs."""
        from nsp.families.next_scale import recipes

        return {
            "next_scale": recipes.emoji,
            "next_scale_sdxl": recipes.sdxl,
            "next_scale_smoke": recipes.smoke,
        }

    @property
    def run_options(self) -> "Callable[..., RunConfig]":
        """The options for a run from a file or a stopped run."""
        from nsp.families.next_scale.recipes import adapted

        return adapted

    def adopt(self, config: NextScaleConfig, trained: NextScaleConfig) -> NextScaleConfig:
        """Return `config` with the autoencoder and the text encoder of the trained model."""
        return config.with_parts_of(trained)

    @property
    def learner(self) -> "Learner[NextScaleConfig, NextScaleSampling, NextScaleSystem]":
        """The part that needs torch."""
        from nsp.families.next_scale.learn import NextScaleLearner

        return NextScaleLearner()
