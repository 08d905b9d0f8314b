"""The family `next_scale`: latents that grow scale by scale, each a residual over the last one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nsp.families.next_scale.config import SIZES, NextScaleConfig, scale_of
from nsp.families.next_scale.examples import examples
from nsp.families.next_scale.io import stages_io
from nsp.families.next_scale.loop import Request, ScaleStep, generate, loop_inputs
from nsp.families.next_scale.precision import stage_weights
from nsp.families.next_scale.requests import request_arrays
from nsp.family.contract import Family, Kind, Learner, Stage
from nsp.stage.io import Sizes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.next_scale.system import NextScaleSystem
    from nsp.family.recipe import PhaseConfig, RunConfig
    from nsp.family.sampling import SamplingConfig
    from nsp.stage.arena import Array
    from nsp.stage.backend import Backend


class NextScale(Family[NextScaleConfig, "NextScaleSystem"]):
    """Continuous latents from a small flow, enlarged by predictors that share a cache."""

    name: ClassVar[str] = "next_scale"
    kv_layouts: ClassVar[tuple[str, ...]] = ("delta",)
    draws_tokens: ClassVar[bool] = False
    default_prompt: ClassVar[str | None] = "a beautiful landscape with mountains and a lake"
    default_seed: ClassVar[int] = 42
    default_batch_size: ClassVar[int | None] = 1
    takes_no_prompt: ClassVar[bool] = True
    config, request, sizes = NextScaleConfig, Request, SIZES

    def condition(self, config: NextScaleConfig) -> Kind:
        """Return what a picture is asked for by."""
        return "prompt"

    def stages(self, config: NextScaleConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order; the decoder has one profile per scale."""
        weights = stage_weights(config)
        sides: tuple[Sizes, ...] = tuple({"h": side, "w": side} for side in config.sides)
        return {
            name: Stage(
                io=io,
                half=weights[name].half,
                full=weights[name].full,
                spans=sides if name == "decoder" else ({},),
            )
            for name, io in stages_io(config, kv_layout, dtype).items()
        }

    def request_arrays(
        self,
        config: NextScaleConfig,
        sampling: "SamplingConfig",
        *,
        seed: int,
        batch: int,
        given: Mapping[str, Any],
    ) -> "dict[str, NDArray[Any]]":
        """Return the loop's noise: that `given`, checked, or drawn from `seed`."""
        return request_arrays(config, sampling, seed=seed, batch=batch, given=given)

    def inputs(self, config: NextScaleConfig, request: Request) -> "dict[str, NDArray[Any]]":
        """Return all that the loop takes from the host."""
        return loop_inputs(config, request)

    def loop(
        self, backend: "Backend", config: NextScaleConfig, inputs: "Mapping[str, Array]"
    ) -> Iterator[ScaleStep]:
        """Yield one ScaleStep per scale."""
        return generate(backend, config, inputs)

    def examples(self, config: NextScaleConfig) -> Sequence[Mapping[str, Any]]:
        """Return arguments of `Pipeline.generate` that together call every stage."""
        return examples(config)

    @property
    def recipes(self) -> "Mapping[str, Callable[[], RunConfig]]":
        """Named training runs."""
        from nsp.families.next_scale import recipes

        return {
            "next_scale": recipes.emoji,
            "next_scale_sdxl": recipes.sdxl,
            "next_scale_smoke": recipes.smoke,
        }

    @property
    def recipe_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What options of `train.py` are for some recipes where they are not given."""
        from nsp.families.next_scale.recipes import SDXL_OPTIONS

        return {"next_scale_sdxl": SDXL_OPTIONS}

    def with_options(
        self,
        run: "RunConfig",
        options: Mapping[str, Any],
        steps_of: "Callable[[PhaseConfig], int]",
    ) -> "RunConfig":
        """Return the run with this family's options of `train.py`."""
        from nsp.families.next_scale.recipes import with_options

        return with_options(run, options, steps_of)

    def adopt(self, config: NextScaleConfig, trained: NextScaleConfig) -> NextScaleConfig:
        """Return `config` with the autoencoder and the text encoder of the trained model."""
        return config.with_parts_of(trained)

    def scale_of(self, config: NextScaleConfig, sizes: Sizes) -> int:
        """Return the scale whose image has the `target_size` asked for."""
        return scale_of(config, sizes)

    @property
    def learner(self) -> "Learner[NextScaleConfig, NextScaleSystem]":
        """What needs torch."""
        from nsp.families.next_scale.learn import NextScaleLearner

        return NextScaleLearner()
