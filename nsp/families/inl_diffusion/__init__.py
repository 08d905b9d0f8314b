"""The family `inl_diffusion`: latents denoised step by step, with integrator neurons.

Source: github.com/Web3-League/inl-diffusion; what of it is not copied, and why, is in
docs/inl_diffusion.md.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nsp.families.inl_diffusion.config import SIZES, InlConfig
from nsp.families.inl_diffusion.loop import batch_key, denoise, given, loop_inputs
from nsp.families.inl_diffusion.sampling import InlSampling
from nsp.families.inl_diffusion.stages import stages
from nsp.family.contract import Family, Kind, Learner, Stage
from nsp.family.order import Encoded, Given, Order, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.inl_diffusion.quick_start import INLVAE, INLDiffusionPipeline, INLDiT
    from nsp.families.inl_diffusion.system import InlSystem
    from nsp.family.recipe import RunConfig
    from nsp.stage.arena import Array
    from nsp.stage.backend import Backend


__all__ = ["INLVAE", "INLDiT", "INLDiffusionPipeline", "InlDiffusion"]


def __getattr__(name: str) -> Any:
    """Import a name of the public package on its first use: it needs torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nsp.families.inl_diffusion import quick_start

    return getattr(quick_start, name)


class InlDiffusion(Family[InlConfig, InlSampling, "InlSystem"]):
    """A KL autoencoder and a diffusion transformer that reads prompts; there is no cache."""

    name: ClassVar[str] = "inl_diffusion"
    kv_layouts: ClassVar[tuple[str, ...]] = ("delta",)
    published: ClassVar[Mapping[str, str]] = {
        "tokenizer": "Weights of the autoencoder (vae_final.pt, or safetensors).",
        "predictor": "Weights of the transformer (dit_final.pt, or safetensors).",
    }
    published_folders: ClassVar[Mapping[str, str]] = {
        "text-encoder": "CLIP or T5 folder, or the file of its own encoder beside tokenizer.json.",
    }
    draws_without_prompt: ClassVar[bool] = True
    config, sampling, sizes = InlConfig, InlSampling, SIZES

    def condition(self, config: InlConfig) -> Kind:
        """Return the kind of condition for a picture."""
        return "prompt"

    def grids(self, config: InlConfig) -> Sequence[tuple[int, int]]:
        """Return the grid of every size of picture."""
        return [(side, side) for side in config.sides]

    def stages(self, config: InlConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order."""
        return stages(config, dtype)

    def given(self, config: InlConfig) -> Mapping[str, Given]:
        """Return the arrays that an order may have."""
        return given(config)

    def null_prompt(self, config: InlConfig, order: Order[InlSampling]) -> str | None:
        """Return the negative prompt, or what stands for no prompt if that is a prompt, too."""
        if order.negative is not None or config.null_condition == "learned":
            return order.negative
        return ""

    def batch_key(self, config: InlConfig, order: Order[InlSampling]) -> Hashable:
        """Return what decides shapes and control flow: the steps, and whether they are guided."""
        return batch_key(config, order)

    def inputs(
        self, config: InlConfig, orders: Sequence[Order[InlSampling]], text: Encoded | None
    ) -> "dict[str, NDArray[Any]]":
        """Return all inputs of the loop from the host."""
        return loop_inputs(config, orders, text)

    def loop(
        self, backend: "Backend", config: InlConfig, inputs: "Mapping[str, Array]"
    ) -> Iterator[Step]:
        """Yield one Step per timestep."""
        return denoise(backend, config, inputs)

    def examples(
        self, config: InlConfig, sampling: InlSampling
    ) -> Sequence[Sequence[Order[InlSampling]]]:
        """Return batches of orders that together call every stage."""
        from nsp.families.inl_diffusion.examples import examples

        return examples(config, sampling)

    @property
    def recipes(self) -> "Mapping[str, Callable[..., RunConfig]]":
        """Named training runs."""
        from nsp.families.inl_diffusion.recipes import RECIPES

        return RECIPES

    def options_of(self, run: Mapping[str, object]) -> "Callable[..., RunConfig] | None":
        """Return the options and variables of `inl_vae` or `inl_dit` for a run that is one."""
        from nsp.families.inl_diffusion.recipes import options_of

        return options_of(run)

    def adopt(self, config: InlConfig, trained: InlConfig) -> InlConfig:
        """Return `config` with the autoencoder and the text encoder of the trained model."""
        read = {name: getattr(trained.dit, name) for name in ("context_width", "context_length")}
        return replace(
            config,
            latent_side=trained.latent_side,
            vae=trained.vae,
            pretrained_vae=None,
            text=trained.text,
            dit=replace(config.dit, **read),
        )

    def convert(
        self, files: Mapping[str, Path], config: Mapping[str, object] | None, output_dir: Path
    ) -> None:
        """Write a checkpoint folder from published weights."""
        from nsp.families.inl_diffusion.published import convert

        convert(files, config, output_dir)

    @property
    def learner(self) -> "Learner[InlConfig, InlSampling, InlSystem]":
        """The part that needs torch."""
        from nsp.families.inl_diffusion.learn import InlLearner

        return InlLearner()
