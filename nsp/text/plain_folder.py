"""Plain text encoders of checkpoints and of new models; the network is in plain.py."""

from collections.abc import Collection
from pathlib import Path

from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.text.encoder import cannot_load, read_encoder_config
from nsp.text.parts import TextEncoderSettings, captions_of
from nsp.text.plain import PLAIN_MODEL_TYPE, PlainTextConfig, PlainTextModel
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from nsp.weights.module_weights import WEIGHTS_NAME, bounded, load_weights
from nsp.weights.weight_files import find_weights, read_shapes

_MLP_RATIO = 4
_KIND = "plain"


def load_plain(folder: Path, *, listed: Collection[str] | None = None) -> PlainTextModel:
    """Return the encoder in a folder, float32, in eval mode.

    With `listed` only files of those names are read. Raises CheckpointError when a file or a weight
    is missing, corrupt or does not fit.
    """
    values = read_encoder_config(folder, (PLAIN_MODEL_TYPE,), kind=_KIND)
    try:
        config = PlainTextConfig.from_dict(
            {name: value for name, value in values.items() if name != "model_type"}
        )
    except ConfigError as error:
        raise cannot_load(folder, error) from error
    (weights,) = find_weights(folder, ("model",), what="encoder", listed=listed)
    if weights.name != WEIGHTS_NAME:
        raise cannot_load(folder, ConfigError(f"its weights are not in {WEIGHTS_NAME}"))
    with bounded(read_shapes(weights).values(), f"text encoder {folder}"):
        model = PlainTextModel(config)
    load_weights(model, folder)
    return model.eval()


def plain_parts(
    settings: TextEncoderSettings, width: int, max_tokens: int, source: ImageSource | None
) -> tuple[PromptTokenizer, PlainTextModel]:
    """Return prompt tokenizer and encoder of a new model, pretrained or new; see `text_parts`."""
    if settings.folder is not None:
        folder = Path(settings.folder)
        is_pipeline = (folder / "text_encoder").is_dir()
        encoder = load_plain(folder / "text_encoder" if is_pipeline else folder)
        tokenizer = PromptTokenizer.load(
            folder, subfolder="tokenizer" if is_pipeline else None, max_tokens=max_tokens
        )
        return tokenizer, encoder
    captions = captions_of(source, "the checkpoint of a model with a plain text encoder")
    tokenizer = train_tokenizer(captions, vocab_size=settings.vocab_size, max_tokens=max_tokens)
    config = PlainTextConfig(
        vocab_size=tokenizer.vocab_size,
        width=width,
        depth=settings.depth,
        num_heads=settings.num_heads,
        mlp_width=_MLP_RATIO * width,
        max_tokens=max_tokens,
    )
    return tokenizer, PlainTextModel(config)


def check_plain_parts(encoder: PlainTextModel, tokenizer: PromptTokenizer) -> None:
    """Raise ConfigError if encoder and tokenizer do not belong to one model."""
    config = encoder.config
    for name, least, makes in (
        ("vocab_size", tokenizer.vocab_size, f"has token ids up to {tokenizer.vocab_size - 1}"),
        ("max_tokens", tokenizer.max_tokens, f"makes prompts of {tokenizer.max_tokens} tokens"),
    ):
        if getattr(config, name) < least:
            raise ConfigError(
                f"the text encoder has {name}={getattr(config, name)}, but the prompt tokenizer "
                f"{makes}; they belong to two models, copy both from one model"
            )
