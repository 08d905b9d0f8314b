"""The public package's own three names, over the pipeline of this one.

    from nsp.families.inl_diffusion import INLVAE, INLDiT, INLDiffusionPipeline

    vae, dit = INLVAE.load("vae_final.pt"), INLDiT.load("dit_final.pt")
    pipeline = INLDiffusionPipeline(vae, dit, "clip/")
    pipeline("red apple", num_inference_steps=50, guidance_scale=7.5).save("output.png")

`nsp convert` makes a checkpoint of the same files, which loads faster and can be exported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nsp import values
from nsp.errors import ConfigError
from nsp.families.inl_diffusion.published import Part, assembled, read_dit, read_vae
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, torch_pipeline


@dataclass(frozen=True, repr=False)
class INLVAE:
    """The published weights of an autoencoder."""

    part: Part

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the weights in a file; CheckpointError for something else."""
        return cls(read_vae(values.path("path", path)))


@dataclass(frozen=True, repr=False)
class INLDiT:
    """The published weights of a transformer."""

    part: Part

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the weights in a file; CheckpointError for something else."""
        return cls(read_dit(values.path("path", path)))


class INLDiffusionPipeline(Pipeline):
    """A `Pipeline` of published weights, in PyTorch."""

    def __init__(
        self,
        vae: INLVAE,
        dit: INLDiT,
        text_encoder: str | Path | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        """Assemble the model.

        Arguments:
            text_encoder: a CLIP or T5 folder, or the file of the model's own encoder beside its
                tokenizer.json.
            config: public constructor arguments that the weights do not show, under "vae", "dit"
                and "text_encoder".
            device: "cpu", "cuda", "cuda:1"; None is the GPU if there is one.

        Raises CheckpointError or ConfigError for parts that do not fit.
        """
        for name, given, kind in (("vae", vae, INLVAE), ("dit", dit, INLDiT)):
            if not isinstance(given, kind):
                raise ConfigError(
                    f"{name} is a {type(given).__name__}; give {kind.__name__}.load(FILE)"
                )
        place = None if text_encoder is None else values.path("text_encoder", text_encoder)
        system = assembled(vae.part, dit.part, place, config or {})
        made = torch_pipeline(family(system.family), system, device=device)
        super().__init__(
            made.family,
            made.config,
            made.backend,
            tokenizer=made.tokenizer,
            sampling=made.sampling,
        )
