"""Token ids to text states: the encoder of T5 as an exportable stage, and its folders.

The network is transformers' `T5EncoderModel` (Raffel et al. 2020, arXiv:1910.10683): positions are
relative, so a prompt may be padded on either side. Prompts are padded on the left here: LlamaGen
moves right-padded states to the end of the prefix, which are the same (tests/text/test_t5.py).
All is computed in float32, because T5 overflows in fp16.

Shapes: N prompts, T tokens, C width.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.text.encoder import (
    cannot_load,
    check_weights,
    import_transformers,
    quiet,
    read_encoder_config,
)
from nsp.text.parts import TextEncoderSettings, captions_of
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from nsp.values import choice, count, real
from nsp.weights.state_names import plain_names
from nsp.weights.weight_files import find_weights, read_safetensors

if TYPE_CHECKING:
    from transformers import T5Config, T5EncoderModel

T5_MODEL_TYPE = "t5"
_EMBEDDING = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
_OTHERS = ("decoder.", "lm_head.")  # of a whole T5
_COUNTS = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
_REALS = {"layer_norm_epsilon": (1e-12, 0.1), "dropout_rate": (0.0, 0.99)}
_PROJECTIONS = ("relu", "gated-gelu", "gated-silu")
# The only keys of config.json that are read.
_READ = (*_COUNTS, *_REALS, "feed_forward_proj", "pad_token_id", "eos_token_id")
_MOST = 2**22


class T5Stage(nn.Module):
    """The encoder as a stage: token ids and mask in, states out, with zeros at padding."""

    def __init__(self, model: "T5EncoderModel") -> None:
        """Wrap `model`, sharing its weights."""
        super().__init__()
        model.set_attn_implementation("eager")  # the mask below is added to the scores
        self.model = model

    def forward(self, token_ids_NT: Tensor, attention_mask_NT: Tensor) -> tuple[Tensor]:
        """Return text states (N, T, C); `attention_mask_NT` is 0 at padding, else 1."""
        real_NT = attention_mask_NT.float()
        added_N11T = (1 - real_NT[:, None, None]) * torch.finfo(torch.float32).min
        states_NTC = self.model(token_ids_NT, attention_mask=added_N11T).last_hidden_state
        return (states_NTC * real_NT[..., None],)


def first_tokens(token_ids_NT: Tensor, pad_id: int) -> Tensor:
    """Return the place (N,) of the first token of prompts that are padded on the left."""
    return (token_ids_NT == pad_id).int().cumprod(1).sum(1)


def build_t5(
    tokenizer: PromptTokenizer, *, width: int, depth: int, num_heads: int
) -> "T5EncoderModel":
    """Return a randomly initialised encoder that fits `tokenizer`, to be trained.

    Weights are drawn from torch's generator by T5's rules. Raises ConfigError for impossible sizes.
    """
    if min(width, depth, num_heads) < 1 or width % num_heads:
        raise ConfigError(
            f"text encoder: width={width}, depth={depth}, num_heads={num_heads}; all must be "
            "positive and width a multiple of num_heads"
        )
    transformers = import_transformers()
    config = transformers.T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=width,
        d_kv=width // num_heads,
        d_ff=2 * width,
        num_layers=depth,
        num_heads=num_heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.eos_id,
    )
    model: T5EncoderModel = transformers.T5EncoderModel(config)
    return model


def load_t5(
    folder: str | Path, *, subfolder: str | None = None, listed: Collection[str] | None = None
) -> "T5EncoderModel":
    """Return the pretrained encoder in a Hugging Face folder, float32, in eval mode.

    Reads `config.json` and safetensors weights, of an encoder or of a whole T5; `subfolder` and
    `listed` are as in `load_text_encoder`. Nothing is downloaded or unpickled. Raises
    CheckpointError when a file or a weight is missing, corrupt or does not fit.
    """
    root = Path(folder) / subfolder if subfolder else Path(folder)
    config = _t5_config(root)
    state: dict[str, Tensor] = {}
    for path in find_weights(root, ("model",), what="encoder", listed=listed):
        found = plain_names(read_safetensors(path), root)
        state |= {n: t for n, t in found.items() if not n.startswith(_OTHERS)}
    state.setdefault("shared.weight", state.get(_EMBEDDING, torch.empty(0)))
    state.pop(_EMBEDDING, None)
    transformers = import_transformers()
    with quiet(transformers):
        check_weights(
            lambda: _own_weights(transformers.T5EncoderModel(config)),
            state,
            root,
            is_own=lambda name: name.startswith("encoder."),
        )
        try:
            model = transformers.T5EncoderModel.from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32
            )
        except Exception as error:  # the library's errors have no common base
            raise cannot_load(root, error) from error
    encoder: T5EncoderModel = model.eval()
    return encoder


def _own_weights(model: "T5EncoderModel") -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != _EMBEDDING}


def _t5_config(root: Path) -> "T5Config":
    """Return the configuration in a folder; CheckpointError for another kind of model."""
    values = read_encoder_config(root, (T5_MODEL_TYPE,), kind="T5")
    read: dict[str, Any] = {name: values[name] for name in _READ if name in values}
    try:
        for name in _COUNTS:
            count(name, read.get(name, 1), most=_MOST)
        for name, (least, most) in _REALS.items():
            real(name, read.get(name, least), least=least, most=most)
        choice("feed_forward_proj", read.get("feed_forward_proj", "relu"), _PROJECTIONS)
        config: T5Config = import_transformers().T5Config(**read)
    except Exception as error:  # validation errors of the library have no common base
        raise cannot_load(root, error) from error
    return config


def t5_parts(
    settings: TextEncoderSettings, width: int, max_tokens: int, source: ImageSource | None
) -> tuple[PromptTokenizer, "T5EncoderModel"]:
    """Return prompt tokenizer and encoder of a new model, pretrained or new; see `text_parts`.

    Prompts have `max_tokens` and are padded on the left. A pretrained encoder has its own width.
    """
    if settings.folder is not None:
        return pretrained_t5(Path(settings.folder), max_tokens)
    captions = captions_of(source, "a T5 folder")
    tokenizer = train_tokenizer(captions, vocab_size=settings.vocab_size, max_tokens=max_tokens)
    encoder = build_t5(tokenizer, width=width, depth=settings.depth, num_heads=settings.num_heads)
    return tokenizer.padded_left(), encoder


def pretrained_t5(folder: Path, max_tokens: int) -> tuple[PromptTokenizer, "T5EncoderModel"]:
    """Return tokenizer and encoder of a T5 folder, or of a pipeline that has them as its parts."""
    is_pipeline = (folder / "text_encoder").is_dir()
    encoder = load_t5(folder, subfolder="text_encoder" if is_pipeline else None)
    tokenizer = PromptTokenizer.load(
        folder, subfolder="tokenizer" if is_pipeline else None, max_tokens=max_tokens
    )
    return tokenizer.padded_left(), encoder


def check_t5_parts(
    encoder: "T5EncoderModel", tokenizer: PromptTokenizer, *, text_width: int, max_tokens: int
) -> None:
    """Raise ConfigError if encoder, tokenizer and condition do not belong to one model."""
    config = encoder.config
    if config.model_type != T5_MODEL_TYPE:
        raise ConfigError(f"the text encoder is of type {config.model_type!r}; T5 is needed")
    if (config.d_model, tokenizer.max_tokens) != (text_width, max_tokens):
        raise ConfigError(
            f"text encoder of width {config.d_model} with {tokenizer.max_tokens} tokens does not "
            f"fit text_width={text_width}, max_tokens={max_tokens}"
        )
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the text encoder has vocab_size={config.vocab_size}, but the prompt tokenizer has "
            f"token ids up to {tokenizer.vocab_size - 1}; they belong to two models, copy both "
            "from one model"
        )
    if tokenizer.padding_side != "left":
        raise ConfigError(
            "the prompt tokenizer pads on the right, but the prompt must end where the picture "
            'begins; set "padding_side": "left" in tokenizer_config.json'
        )
