"""A whole CLIP that the user has as a folder: cosines of pictures and captions.

The network is transformers' `CLIPModel` (Radford et al. 2021, arXiv:2103.00020).
Shapes: N pictures, T tokens of their captions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nsp.errors import CheckpointError, ConfigError
from nsp.text.encoder import (
    cannot_load,
    check_weights,
    import_transformers,
    quiet,
    read_encoder_config,
)
from nsp.text.tokenizer import PromptTokenizer
from nsp.values import count, real
from nsp.weights.weight_files import find_weights, read_safetensors, read_settings

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

NO_FOLDER = (
    "no CLIP score without a CLIP: give its folder (config.json, model.safetensors, tokenizer), "
    "such as a copy of openai/clip-vit-base-patch32, with --clip FOLDER"
)
# Keys of config.json that are read, and what each may be.
_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("projection_dim", "vocab_size", "max_position_embeddings", "image_size", "patch_size"),
)
_REALS = {"layer_norm_eps": (1e-12, 0.1), "attention_dropout": (0.0, 0.99)}
_OTHERS = ("hidden_act", "bos_token_id", "eos_token_id", "pad_token_id")
_MOST = 2**22
_MAX_IMAGE_PX = 1024
# Of the pictures that CLIP was trained on; preprocessor_config.json may have others.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP with its tokenizer and the preparation of its pictures."""

    def __init__(
        self,
        model: "CLIPModel",
        tokenizer: PromptTokenizer,
        *,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._side_px: int = model.config.vision_config.image_size
        self._mean, self._std = (np.array(each, np.float32) for each in (mean, std))

    def pixels(self, picture: Image.Image) -> NDArray[np.float32]:
        """Return (3, H, W) as CLIPImageProcessor does: the short side resized, the centre cut."""
        side, short = self._side_px, min(picture.size)
        width, height = (int(side * each / short) for each in picture.size)
        resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - side) // 2, (width - side) // 2
        square = resized[top : top + side, left : left + side].astype(np.float32) / np.float32(255)
        normal: NDArray[np.float32] = (square - self._mean) / self._std
        return normal.transpose(2, 0, 1)

    @torch.inference_mode()
    def cosines(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Return the cosine (N,) of every picture with its caption."""
        device = self.model.device
        ids_NT = torch.from_numpy(self.tokenizer.encode(captions)).to(device)
        pixels = torch.from_numpy(np.stack([self.pixels(each) for each in pictures])).to(device)
        found = self.model(input_ids=ids_NT, pixel_values=pixels)
        products: Tensor = (found.image_embeds * found.text_embeds).sum(-1)
        return products.float().cpu()


def load_clip(folder: Path | None, device: torch.device) -> Clip:
    """Return the CLIP in a transformers folder; nothing is downloaded or unpickled.

    Raises ConfigError without a folder, CheckpointError for one that has no whole CLIP.
    """
    if folder is None:
        raise ConfigError(NO_FOLDER)
    config = _config(folder)
    state: dict[str, Tensor] = {}
    for path in find_weights(folder, ("model",), what="CLIP"):
        state |= read_safetensors(path)
    state = {name: each for name, each in state.items() if not name.endswith("position_ids")}
    transformers = import_transformers()
    check_weights(
        lambda: transformers.CLIPModel(config).state_dict(), state, folder, is_own=lambda name: True
    )
    try:
        with quiet(transformers):
            model = transformers.CLIPModel.from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32
            )
    except Exception as error:  # the library's errors have no common base
        raise cannot_load(folder, error) from error
    tokenizer = PromptTokenizer.load(folder)
    text = model.config.text_config
    if (
        tokenizer.vocab_size > text.vocab_size
        or tokenizer.max_tokens > text.max_position_embeddings
    ):
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens in prompts of "
            f"{tokenizer.max_tokens}, but the model {text.vocab_size} in prompts of "
            f"{text.max_position_embeddings}; copy both from one CLIP"
        )
    return Clip(model.eval().to(device), tokenizer, **_normalisation(folder))


def _config(folder: Path) -> "CLIPConfig":
    """Return the configuration; CheckpointError for values that no CLIP can have."""
    values = read_encoder_config(folder, ("clip",), kind="whole CLIP")
    transformers = import_transformers()
    try:
        parts = [_checked(values.get(name)) for name in ("text_config", "vision_config")]
        count("image_size", parts[1].get("image_size", 224), most=_MAX_IMAGE_PX)
        width = count("projection_dim", values.get("projection_dim", 512), most=_MOST)
        with quiet(transformers):
            config: CLIPConfig = transformers.CLIPConfig(
                text_config=parts[0], vision_config=parts[1], projection_dim=width
            )
    except Exception as error:  # validation errors have no common base
        raise cannot_load(folder, error) from error
    return config


def _checked(values: object) -> dict[str, Any]:
    """Return the keys that are read of a half's configuration; ConfigError for a bad number."""
    if not isinstance(values, dict):
        raise ConfigError("text_config and vision_config are needed")
    read = {n: values[n] for n in (*_COUNTS, *_REALS, *_OTHERS) if n in values}
    for name, value in read.items():
        if name in _COUNTS:
            count(name, value, most=_MOST)
        elif name in _REALS:
            real(name, value, least=_REALS[name][0], most=_REALS[name][1])
    return read


def _normalisation(folder: Path) -> dict[str, Sequence[float]]:
    """Return mean and deviation of the colours in preprocessor_config.json, if there is one."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    values = read_settings(file)
    found: dict[str, Sequence[float]] = {}
    for name, least in (("mean", -10.0), ("std", 1e-3)):
        numbers = values.get(f"image_{name}")
        if numbers is None:
            continue
        if not isinstance(numbers, list) or len(numbers) != 3:
            raise CheckpointError(f"{file}: image_{name} must be three numbers; copy it again")
        try:
            found[name] = [real(f"image_{name}", each, least=least, most=10.0) for each in numbers]
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}; copy it again") from error
    return found
