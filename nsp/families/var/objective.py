"""The predictor phase of the family `var`: the transformer learns the frozen tokenizer's tokens.

Axes: B batch, L tokens of all scales, T prompt tokens, V codes.
Source: arXiv:2404.02905; github.com/FoundationVision/VAR, trainer.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from nsp.config import Config
from nsp.data.dataset import to_model_range
from nsp.data.stream import ShardStream
from nsp.errors import ConfigError
from nsp.families.var.model import Conditioning, NextScaleTransformer
from nsp.families.var.quantizer import MultiScaleQuantizer
from nsp.families.var.system import VarSystem
from nsp.family.objective import Batch, Objective, TrainingData
from nsp.text.parts import without_tokens
from nsp.training.data_order import sample_uniforms
from nsp.training.generated import generated
from nsp.training.tokens import Conditions, TokenDataset, check_classes

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class ScalePrefix(Config):
    """Some of the steps train only the first scales.

    Late scales have most of the tokens, and the first ones decide what the picture shows. Teacher
    forcing lets every scale learn from the start, so the steps are mixed, and all scales see the
    whole schedule of learning rates; the published progressive training (train.py --pg) adds scales
    one after another.
    """

    num_scales: int  # at least 2
    share: float  # fraction of the steps


@dataclass(frozen=True, kw_only=True)
class PredictorSettings(Config):
    """Settings of the predictor phase; defaults as the published trainer's."""

    label_smoothing: float = 0.0
    sample_guidance_scale: float = 2.0
    train_text_encoder: bool = True  # False keeps a pretrained one as it is
    prefixes: tuple[ScalePrefix, ...] = ()  # steps of fewer scales; the rest trains all
    # A prompt loses a random fraction of its tokens in every step, up to this. The remaining words
    # fit many pictures, so the model learns what each word means. Without it the model knows only
    # whole captions, and confuses captions with new combinations of words.
    token_drop: float = 0.0

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.token_drop < 1:
            raise ConfigError(f"token_drop must be in [0, 1), got {self.token_drop}")


class PredictorObjective(Objective):
    """Trains the transformer, and the text encoder if there is one, on the tokenizer's tokens.

    The tokenizer is frozen.
    """

    def __init__(
        self,
        system: VarSystem,
        data: TrainingData,
        settings: PredictorSettings,
    ) -> None:
        super().__init__()
        self.settings, self.data = settings, data
        self._num_scales = system.config.num_scales
        _check_prefixes(settings.prefixes, self._num_scales)
        if settings.token_drop > 0 and system.prompt_tokenizer is None:
            raise ConfigError(
                "token_drop is for prompts, but this model is class-conditional; omit it"
            )
        self.needs_captions = system.config.text is not None
        self.system = system.requires_grad_(False)
        parts: dict[str, nn.Module] = {"predictor": system.predictor}
        if system.text_encoder is not None and settings.train_text_encoder:
            parts["text_encoder"] = system.text_encoder
        self.trained = nn.ModuleDict(parts).requires_grad_(True)

    def dataset(self) -> Dataset[Mapping[str, object]]:
        """Return conditions with tokens, or the pictures of a stream."""
        if isinstance(self.data.pictures, ShardStream):
            return self.data.pictures
        tokenizing = self.system.tokenizing()
        return TokenDataset(self.data.pictures, tokenizing, self._asked(), self.data.cache)

    def held_out(self) -> Dataset[Mapping[str, object]] | None:
        """Return the held-out pictures as `dataset` does."""
        if self.data.held_out is None:
            return None
        return TokenDataset(self.data.held_out, self.system.tokenizing(), self._asked())

    def _asked(self) -> Conditions:
        config = self.system.config
        return config.num_classes if config.text is None else self.system.encode_prompts

    def units(self) -> Sequence[nn.Module]:
        """Return attention, feed-forward and modulation of every block.

        Not whole blocks: their modulations and prompt keys are computed ahead of them.
        """
        parts = ("attn", "ffn", "ada_lin")
        blocks = self.system.predictor.blocks
        return [getattr(b, part) for b in blocks for part in parts if hasattr(b, part)]

    def before_step(self, step: int, steps: int) -> bool:
        """Choose how many scales this step trains; only losses of all of them compare."""
        sides = self.system.config.patch_nums
        self._num_scales = _scales_of_step(step, self.settings.prefixes, len(sides))
        lengths = [side**2 for side in sides]
        self.work = sum(lengths[: self._num_scales]) / sum(lengths)
        return self._num_scales == len(sides)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the metrics of `predictor_loss`; in training, the loss as a mean over tokens."""
        system = self.system
        condition_B = batch["condition"] if "condition" in batch else self._conditions(batch)
        rate = system.config.predictor.cond_drop_rate if self.training else 0.0
        uniforms = sample_uniforms(batch["key"], 2 + condition_B[0].numel()).to(condition_B.device)
        dropped = uniforms[:, 0] < rate
        if self.training and self.settings.token_drop > 0:
            assert system.prompt_tokenizer is not None  # as checked at the start
            share_B1 = self.settings.token_drop * uniforms[:, 1:2]
            condition_B = without_tokens(
                condition_B, uniforms[:, 2:] < share_B1, system.prompt_tokenizer
            )
        if "tokens" in batch:
            tokens_BL = batch["tokens"].long()
        else:
            tokens_BL = torch.cat(system.vae.tokenize(to_model_range(batch["image"])), 1)
        metrics = predictor_loss(
            system.predictor,
            system.vae.quantize,
            system.condition(condition_B, dropped),
            tokens_BL,
            label_smoothing=self.settings.label_smoothing if self.training else 0.0,
            num_scales=self._num_scales if self.training else None,
        )
        if self.training:
            # The mean over the step's own tokens: as a part of all tokens' sum, gradients of short
            # steps would be lost beside the second moments that long steps leave in Adam.
            metrics["loss"] = metrics["loss"] / self.work
        return metrics

    def _conditions(self, batch: Batch) -> Tensor:
        """Return class ids (B,) or prompt token ids (B, T) of a stream's pictures."""
        if self.system.config.text is None:
            class_ids: Tensor = batch["class_id"]
            if (
                self.system.config.num_classes == 1
            ):  # all pictures belong to it, with or without a class
                class_ids = class_ids.clamp_min(0)
            check_classes(class_ids, self.system.config.num_classes)
            return class_ids
        return self.system.encode_prompts(batch["caption"]).to(batch["image"].device)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return the published rule."""
        return decays(name, parameter)

    def samples(self, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Return pictures generated for conditions of the data set, with their captions."""
        guidance = self.settings.sample_guidance_scale
        return generated(self.system, self.data.pictures, seed, guidance_scale=guidance, top_k=1)


def _check_prefixes(prefixes: Sequence[ScalePrefix], num_scales: int) -> None:
    """Raise ConfigError for a wrong number of scales, or shares without steps of all scales."""
    for prefix in prefixes:
        if not 2 <= prefix.num_scales < num_scales:
            raise ConfigError(
                f"prefixes: num_scales must be in 2..{num_scales - 1}, got {prefix.num_scales}"
            )
    if any(prefix.share <= 0 for prefix in prefixes) or sum(p.share for p in prefixes) >= 1:
        raise ConfigError("prefixes: each share must be above 0, and their sum below 1")


def _scales_of_step(step: int, prefixes: Sequence[ScalePrefix], num_scales: int) -> int:
    """Return how many scales a step trains: a function of the step, spread evenly by share."""
    place = step * _GOLDEN % 1  # multiples of the golden ratio fill [0, 1) evenly from any step on
    for prefix in prefixes:
        if place < prefix.share:
            return prefix.num_scales
        place -= prefix.share
    return num_scales


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: not to 1-D tensors, biases, tables, attention scales.

    The class embedding is decayed. Source: github.com/FoundationVision/VAR, utils/lr_control.py.
    """
    tables = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul", "text_null")
    if parameter.ndim <= 1 or name.endswith("bias"):
        return False
    return not any(table in name for table in tables)


def predictor_loss(
    predictor: NextScaleTransformer,
    quantize: MultiScaleQuantizer,
    conditioning: Conditioning,
    tokens_BL: Tensor,
    *,
    label_smoothing: float = 0.0,
    num_scales: int | None = None,
    newest_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Return `loss`, and detached cross-entropy (nats per token) and accuracy (%).

    Of these two there are means over all tokens and over the last scale's. The loss is the batch
    mean of the sum over tokens of CE / L, L being the tokens of the whole schedule. Progressive
    training predicts the first `num_scales` scales only; the newest one's tokens then weigh
    `newest_weight` / L, and weights are not renormalised.
    """
    sides = quantize.patch_nums
    used = len(sides) if num_scales is None else num_scales
    lengths = [side**2 for side in sides[:used]]
    targets_BL = tokens_BL[:, : sum(lengths)]
    maps = torch.split(targets_BL, lengths, 1)
    logits_BLV = predictor(conditioning, quantize.teacher_input(maps[: used - 1])).float()
    per_token_BL = F.cross_entropy(
        logits_BLV.transpose(1, 2), targets_BL, label_smoothing=label_smoothing, reduction="none"
    )
    weights_L = torch.full_like(per_token_BL[0], 1 / sum(side**2 for side in sides))
    if used < len(sides):
        weights_L[-lengths[-1] :] *= newest_weight
    with torch.no_grad():
        correct_BL = (logits_BLV.argmax(-1) == targets_BL).float() * 100
        tail = per_token_BL[:, -lengths[-1] :].mean()
    return {
        "loss": (per_token_BL * weights_L).sum(1).mean(),
        "ce": per_token_BL.detach().mean(),
        "ce_last": tail,
        "accuracy": correct_BL.mean(),
        "accuracy_last": correct_BL[:, -lengths[-1] :].mean(),
    }
