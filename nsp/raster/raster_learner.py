"""What the torch side of raster families has in common; a family adds its systems and modules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.data.sources import ImageSource, Sample
from nsp.errors import ConfigError
from nsp.family.contract import Learner
from nsp.family.objective import Objective, TrainingData
from nsp.family.order import Order
from nsp.raster.predictor_phase import PredictorObjective, PredictorSettings
from nsp.raster.raster_config import RasterConfig
from nsp.raster.raster_system import RasterSystem
from nsp.raster.sampling import RasterSampling
from nsp.raster.tokenizer_phase import TokenizerObjective, TokenizerSettings
from nsp.training.reconstruction import reconstructed
from nsp.training.tokens import write_tokens

if TYPE_CHECKING:
    from nsp.data.dataset import ImageDataset

RC = TypeVar("RC", bound=RasterConfig)
RY = TypeVar("RY", bound=RasterSystem)

SHARP_STD = 1.0  # of untrained output weights: of thousands of codes a few are likely
_UNTRAINED_CAPTIONS = ("red apple", "two-hump camel", "smiling cat with heart-eyes")


def untrained_source() -> ImageSource:
    """Return captions without pictures, for the prompt tokenizer of an untrained model."""
    samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in _UNTRAINED_CAPTIONS)
    return ImageSource(samples, (), ())


class RasterLearner(Learner[RC, RasterSampling, RY]):
    """Trains an image tokenizer, then a transformer that draws its codes."""

    parts: ClassVar[tuple[str, ...]] = ("gpt", "vq")
    predictor: ClassVar[type[PredictorObjective]] = PredictorObjective

    @torch.no_grad()
    def without_cache(
        self,
        system: RY,
        orders: Sequence[Order[RasterSampling]],
        tokens: Sequence[NDArray[np.int64]],
        latents: Sequence[NDArray[np.float32]],
    ) -> Sequence[NDArray[np.float32]]:
        """Return the logits of every row of codes from one pass, as in training."""
        codes = torch.from_numpy(np.concatenate(tokens, 1))
        conditions = system.conditions
        ids = (
            torch.tensor([order.condition or 0 for order in orders])
            if isinstance(conditions, int)
            else conditions([str(order.condition or "") for order in orders])
        )
        logits = system.logits(ids, torch.zeros(len(orders), dtype=torch.bool), codes)
        return [each.numpy() for each in logits.split(system.config.grid_side, 1)]

    def objective(
        self,
        phase: str,
        settings: Mapping[str, object],
        system: RY,
        data: TrainingData,
    ) -> Objective:
        """Return the objective of a phase; raise ConfigError for an unknown one."""
        if phase == "tokenizer":
            return TokenizerObjective(system.vq, data, TokenizerSettings.from_dict(settings))
        if phase == "predictor":
            return self.predictor(system, data, PredictorSettings.from_dict(settings))
        raise ConfigError(
            f"unknown phase {phase!r} of family {system.family}; known: tokenizer, predictor"
        )

    def reconstruct(self, system: RY, pictures_BHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return pictures as their codes keep them."""
        return reconstructed(system.vq, system.vq.rebuilt, pictures_BHW3)

    def write_cache(self, system: RY, data: "ImageDataset", file: Path) -> None:
        """Write the codes of all pictures to `file`, for `data.token_cache` of later runs."""
        write_tokens(system.tokenizing(), data, file)
