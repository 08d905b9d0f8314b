"""The predictor phase of raster models: the transformer learns the frozen tokenizer's codes.

With `patch_level` L above 1 it learns patches of codes first, 2^(L-1) codes wide, then patches half
as wide, and codes in the end (Pang et al. 2024, arXiv:2412.15321). A patch costs as much as a code,
so the first steps are cheap. Of E epochs, the patches 2^k codes wide end after int(E epoch_rate^k),
as in the public trainer. Axes as in patches.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from nsp.config import Config
from nsp.data.codes import CodeDataset
from nsp.data.dataset import to_model_range
from nsp.data.stream import ShardStream
from nsp.errors import ConfigError
from nsp.family.objective import Batch, Objective, TrainingData
from nsp.raster.patches import patch_loss
from nsp.raster.raster_system import RasterSystem
from nsp.training.code_sets import CodeTokens
from nsp.training.data_order import sample_uniforms
from nsp.training.generated import generated
from nsp.training.tokens import TokenDataset, check_classes


@dataclass(frozen=True, kw_only=True)
class PredictorSettings(Config):
    """Settings of the predictor phase."""

    patch_level: int = 1  # L; 1 learns codes alone
    epoch_rate: float = 0.5  # of every level's end to that of the next
    rates_per_level: bool = False  # every level has the whole schedule of the learning rate
    sample_guidance_scale: float = 2.0
    train_text_encoder: bool = True  # False keeps a pretrained one as it is

    def __post_init__(self) -> None:
        """Check the levels."""
        self.check_counts("objective", "patch_level", most=8)
        if not 0 < self.epoch_rate < 1:
            raise ConfigError(f"epoch_rate must be in (0, 1), got {self.epoch_rate}")

    def level_at(self, step: int, steps: int, epoch: int = 1) -> "PatchLevel":
        """Return what a step learns; levels end with an epoch if the phase has whole ones."""
        unit = epoch if steps % epoch == 0 else 1
        first = 0
        for level in range(self.patch_level - 1, 0, -1):
            end = int(steps // unit * self.epoch_rate**level) * unit
            if step < end:
                return PatchLevel(2**level, first, end - first)
            first = end
        return PatchLevel(1, first, steps - first)


@dataclass(frozen=True)
class PatchLevel:
    """The steps of a phase that learn patches of one size."""

    side: int  # in codes
    first: int
    steps: int


class PredictorObjective(Objective):
    """Trains the transformer, and the text encoder if there is one; the tokenizer is frozen."""

    takes_codes = True

    def __init__(
        self, system: RasterSystem, data: TrainingData, settings: PredictorSettings
    ) -> None:
        super().__init__()
        self.settings, self.data, self._patch_side = settings, data, 1
        listed = 0 if isinstance(data.pictures, ShardStream) else len(data.pictures)
        self._epoch = max(listed // data.batch_size, 1)
        widest = 2 ** (settings.patch_level - 1)
        if system.config.grid_side % widest:
            raise ConfigError(
                f"patch_level={settings.patch_level} needs patches {widest} codes wide, which do "
                f"not fill a grid of {system.config.grid_side}"
            )
        self.needs_captions = not isinstance(system.conditions, int)
        self.system = system.requires_grad_(False)
        parts: dict[str, nn.Module] = {"gpt": system.gpt}
        if system.text_encoder is not None and settings.train_text_encoder:
            parts["text_encoder"] = system.text_encoder
        self.trained = nn.ModuleDict(parts).requires_grad_(True)

    def dataset(self) -> Dataset[Mapping[str, object]]:
        """Return conditions with codes, or the pictures of a stream."""
        pictures, grid = self.data.pictures, self.system.config.grid
        if isinstance(pictures, CodeDataset):
            if not isinstance(self.system.conditions, int):
                raise ConfigError(
                    "a folder of codes has classes, but this model reads captions; give pictures"
                )
            return CodeTokens(
                pictures,
                self.system.tokenizing(),
                num_classes=self.system.conditions,
                length=grid.length,
                num_codes=grid.num_codes,
            )
        if isinstance(pictures, ShardStream):
            return pictures
        tokenizing, conditions = self.system.tokenizing(), self.system.conditions
        return TokenDataset(pictures, tokenizing, conditions, self.data.cache)

    def held_out(self) -> Dataset[Mapping[str, object]] | None:
        """Return the held-out pictures as `dataset` does."""
        if self.data.held_out is None:
            return None
        return TokenDataset(self.data.held_out, self.system.tokenizing(), self.system.conditions)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the transformer."""
        return self.system.units()

    def before_step(self, step: int, steps: int) -> bool:
        """Choose the patches that this step learns; only losses of codes compare."""
        self._patch_side = self.settings.level_at(step, steps, self._epoch).side
        self.work = 1 / self._patch_side**2
        return self._patch_side == 1

    def span(self, step: int, steps: int) -> tuple[int, int]:
        """Return the steps of the level, or of the phase."""
        level = self.settings.level_at(step, steps, self._epoch)
        return (level.first, level.steps) if self.settings.rates_per_level else (0, steps)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, in nats per code; of codes also the perplexity and accuracy in %."""
        system, side = self.system, self._patch_side if self.training else 1
        condition_B = batch["condition"] if "condition" in batch else self._conditions(batch)
        rate = system.config.gpt.cond_drop_rate if self.training else 0.0
        dropped_B = sample_uniforms(batch["key"], 1)[:, 0].to(condition_B.device) < rate
        if "tokens" in batch:
            codes_BN = batch["tokens"].long()
        else:
            codes_BN = system.vq.tokenize(to_model_range(batch["image"]))
        logits_BMV = system.logits(condition_B, dropped_B, codes_BN, side).float()
        loss = patch_loss(logits_BMV, codes_BN, system.config.grid_side, side).mean()
        if side > 1:
            return {"loss": loss}
        with torch.no_grad():
            accuracy = (logits_BMV.argmax(-1) == codes_BN).float().mean() * 100
        return {"loss": loss, "perplexity": loss.detach().exp(), "accuracy": accuracy}

    def _conditions(self, batch: Batch) -> Tensor:
        """Return class ids (B,) or prompt token ids (B, T) of a stream's pictures."""
        conditions = self.system.conditions
        if not isinstance(conditions, int):
            return conditions(batch["caption"]).to(batch["image"].device)
        class_ids = batch["class_id"]
        if conditions == 1:  # all pictures belong to it, with or without a class
            class_ids = class_ids.clamp_min(0)
        check_classes(class_ids, conditions)
        return class_ids

    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures generated for conditions of the data set, with their captions."""
        guidance = self.settings.sample_guidance_scale
        return generated(self.system, self.data.pictures, seed, guidance_scale=guidance)
