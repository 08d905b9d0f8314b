"""Token ids to text states: CLIP's text transformer as an exportable stage.

The network is transformers' `CLIPTextModel` (Radford et al. 2021, arXiv:2103.00020): a causal
transformer over the padded prompt; the state at the end token represents the whole prompt.

Shapes: B batch, T prompt tokens, D width.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from nsp.errors import CheckpointError, ConfigError, MissingExtraError
from nsp.text.tokenizer import PromptTokenizer
from nsp.values import count, integer, real, shown
from nsp.weights.module_weights import bounded, check_finite, check_types, rounded_to_eight_bits
from nsp.weights.state_names import plain_names, what_it_is
from nsp.weights.weight_files import find_weights, give_usual_mode, read_safetensors, read_settings

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel

    from nsp.text.clip_pair import ClipPair
    from nsp.text.plain import PlainTextModel

    # Of any family.
    TextModel: TypeAlias = CLIPTextModel | T5EncoderModel | PlainTextModel | ClipPair

log = logging.getLogger(__name__)

# Early CLIP configs have this id, which no CLIP tokenizer uses for its end token; transformers
# then uses the largest id in the prompt (huggingface/transformers pull request 24773).
LEGACY_EOS_ID = 2
TEXT_MODEL_TYPES = ("clip_text_model", "clip")  # the text half alone; both halves of CLIP
# Beginnings of the names of a text encoder's weights; no other part of a CLIP has such names.
_OWN_NAMES = ("embeddings.", "encoder.", "final_layer_norm.")
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REALS = {"layer_norm_eps": (1e-12, 0.1), "attention_dropout": (0.0, 0.99)}
# The only keys of config.json that are read; the library would also use others (attention type).
_READ = (*_COUNTS, *_REALS, "hidden_act", "projection_dim", *_IDS)
_MOST = 2**22  # largest value of such a count; the largest vocabularies have 2**18
_POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, ...: a buffer of older versions


class TextEncoderStage(nn.Module):
    """The text encoder as a stage: token ids in, states and their summary out.

    `CLIPTextModel.forward` up to two places that do not export well: the causal mask is a constant,
    and the end token's state is picked by a product with a one-hot row.
    """

    causal_mask: Tensor
    position_T: Tensor

    def __init__(self, model: "CLIPTextModel") -> None:
        """Wrap `model`, sharing its weights."""
        super().__init__()
        eos_id = model.config.eos_token_id
        if not isinstance(eos_id, int):
            raise CheckpointError(
                f"text encoder config: eos_token_id is {eos_id!r}; one token id is needed"
            )
        # The boolean mask below means "add 1" to transformers' eager attention.
        model.set_attn_implementation("sdpa")
        self.model = model
        self.eos_id = eos_id
        max_tokens: int = model.config.max_position_embeddings
        device = model.device
        mask = torch.ones(1, 1, max_tokens, max_tokens, dtype=torch.bool, device=device).tril()
        self.register_buffer("causal_mask", mask, persistent=False)
        positions_T = torch.arange(max_tokens, device=device)
        self.register_buffer("position_T", positions_T, persistent=False)

    def forward(self, token_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return text states (B, T, D) after the final norm and pooled text (B, D), both float32.

        Pooled is the state at the first end token, as in `CLIPTextModel`. T is at most the length
        the model was built for. Export with a batch of at least 2: 1 would be taken as a constant.
        """
        num_tokens = token_ids_BT.shape[1]
        mask = self.causal_mask[:, :, :num_tokens, :num_tokens]
        output = self.model(input_ids=token_ids_BT, attention_mask=mask)
        states_BTD: Tensor = output.last_hidden_state.float()
        chosen_BT = self.end_positions(token_ids_BT).to(states_BTD.dtype)
        return states_BTD, (states_BTD * chosen_BT[:, :, None]).sum(dim=1)

    def end_positions(self, token_ids_BT: Tensor) -> Tensor:
        """Return (B, T) booleans, true at the pooled state: the first of the largest keys."""
        if self.eos_id == LEGACY_EOS_ID:
            key_BT = token_ids_BT
        else:
            key_BT = (token_ids_BT == self.eos_id).to(torch.int64)
        # Integers, so that no reduced precision can merge neighbours; earlier positions win ties.
        num_tokens = token_ids_BT.shape[1]
        score_BT = key_BT * num_tokens - self.position_T[:num_tokens]
        return score_BT == score_BT.amax(dim=1, keepdim=True)


def build_text_encoder(
    tokenizer: PromptTokenizer,
    *,
    width: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
) -> "CLIPTextModel":
    """Return a randomly initialised text encoder that fits `tokenizer`, to be trained.

    Weights are drawn from torch's generator by CLIP's rules. Raises ConfigError for impossible
    sizes.
    """
    if min(width, depth, num_heads) < 1 or width % num_heads or int(width * mlp_ratio) < 1:
        raise ConfigError(
            f"text encoder: width={width}, depth={depth}, num_heads={num_heads}, "
            f"mlp_ratio={mlp_ratio}; all must be positive and width a multiple of num_heads"
        )
    transformers = import_transformers()
    config = transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=int(width * mlp_ratio),
        projection_dim=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        max_position_embeddings=tokenizer.max_tokens,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    model: CLIPTextModel = transformers.CLIPTextModel(config)
    return model


def load_text_encoder(
    folder: str | Path, *, subfolder: str | None = None, listed: Collection[str] | None = None
) -> "CLIPTextModel":
    """Return the pretrained text encoder in a Hugging Face folder, float32, in eval mode.

    Reads `config.json` and safetensors weights: of a text encoder, of a whole CLIP, or of the
    pipeline part that `subfolder` names ("text_encoder"). With `listed` only files of those names
    are read. Nothing is downloaded or unpickled. Raises CheckpointError when a file or a weight is
    missing, corrupt or does not fit.
    """
    root = Path(folder) / subfolder if subfolder else Path(folder)
    config = _read_config(root)
    state: dict[str, Tensor] = {}
    for path in find_weights(root, ("model",), what="encoder", listed=listed):
        state |= read_safetensors(path)
    return clip_model(config, plain_names(state, root), root)


def clip_model(
    config: "CLIPTextConfig", state: Mapping[str, Tensor], root: Path
) -> "CLIPTextModel":
    """Return the text encoder with these weights; `root` is where they lie, for errors."""
    transformers = import_transformers()
    check_weights(
        lambda: transformers.CLIPTextModel(config).state_dict(),
        _without_prefix(state),
        root,
        is_own=_is_own,
    )
    if eight := rounded_to_eight_bits(state):
        log.warning("text encoder %s: %s have 8-bit weights, which were rounded", root, eight)
    try:
        with quiet(transformers):
            model = transformers.CLIPTextModel.from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32
            )
    except Exception as error:  # the library's errors have no common base
        raise cannot_load(root, error) from error
    encoder: CLIPTextModel = model.eval()
    return encoder


def _read_config(root: Path) -> "CLIPTextConfig":
    """Return the configuration of the text encoder, or of the text half of a whole CLIP."""
    values = read_encoder_config(root, TEXT_MODEL_TYPES, kind="CLIP")
    if values["model_type"] == "clip":
        values = values.get("text_config", {})
    return clip_config(values, root)


def clip_config(values: object, root: Path) -> "CLIPTextConfig":
    """Return the configuration with these values; `root` is where they lie, for errors."""
    if not isinstance(values, Mapping):
        raise cannot_load(root, ConfigError(f"text_config is {shown(values)}"))
    read = {name: values[name] for name in _READ if name in values}
    _check_numbers(read, root)
    transformers = import_transformers()
    try:
        with quiet(transformers):
            config: CLIPTextConfig = transformers.CLIPTextConfig(**read)
    except Exception as error:  # validation errors have no common base
        raise cannot_load(root, error) from error
    return config


def _check_numbers(values: Mapping[str, Any], root: Path) -> None:
    """Raise CheckpointError for a number that no text encoder can have.

    transformers accepts any; the first prompt would then fail with a library's error, or its states
    would be wrong without an error.
    """
    try:
        for name, value in values.items():
            if name in _COUNTS:
                count(name, value, most=_MOST)
            elif name in _REALS:
                real(name, value, least=_REALS[name][0], most=_REALS[name][1])
            elif name == "eos_token_id":
                integer(name, value, least=0, most=_MOST)
    except ConfigError as error:
        raise cannot_load(root, error) from error


def check_weights(
    build: Callable[[], Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    root: Path,
    *,
    is_own: Callable[[str], bool],
) -> None:
    """Raise CheckpointError if the weights are not those of the encoder that `build` gives.

    transformers fills missing weights with random numbers, ignores further ones (a layer that
    the configuration does not count) and continues. A name that is not `is_own` belongs to the rest
    of a larger model.
    """
    shapes = [tensor.shape for tensor in state.values()]
    with bounded(shapes, f"text encoder {root} cannot be loaded"), torch.device("meta"):
        own = build()
    for problem, names in (
        ("lacks", sorted(own.keys() - state.keys())),
        (
            "has the wrong shape for",
            [n for n in own if n in state and own[n].shape != state[n].shape],
        ),
        ("does not use", sorted(n for n in state.keys() - own.keys() if is_own(n))),
    ):
        if names:
            held = "" if own.keys() & state.keys() else f"; it {what_it_is(root, state)}"
            raise CheckpointError(
                f"text encoder {root} {problem} {len(names)} weights, first {names[0]}; "
                f"config.json and weights do not belong together, copy the folder again{held}"
            )
    check_types(own, state, f"text encoder {root}")
    check_finite(own, state, f"text encoder {root}")


def _is_own(name: str) -> bool:
    """Return whether a weight of this name belongs only to a text encoder."""
    return name.startswith(_OWN_NAMES) and name != _POSITION_IDS


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of transformers 5, without the prefix `text_model.`."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def cannot_load(root: Path, error: Exception) -> CheckpointError:
    """Return the error for a folder whose encoder cannot be loaded, with the reason."""
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"text encoder {root} cannot be loaded: {reason}")


def check_text_parts(
    encoder: "CLIPTextModel", tokenizer: PromptTokenizer, *, text_width: int, max_tokens: int
) -> None:
    """Raise ConfigError if encoder, tokenizer and text condition do not belong to one model.

    Each may be valid alone, but together they would look up missing tokens, or use the state of a
    wrong token for the whole prompt.
    """
    config = encoder.config
    if config.model_type not in TEXT_MODEL_TYPES:
        raise ConfigError(f"the text encoder is of type {config.model_type!r}; CLIP's is needed")
    if (config.hidden_size, tokenizer.max_tokens) != (text_width, max_tokens):
        raise ConfigError(
            f"text encoder of width {config.hidden_size} with {tokenizer.max_tokens} tokens does "
            f"not fit text_width={text_width}, max_tokens={max_tokens}"
        )
    for name, least, needs in (
        ("vocab_size", tokenizer.vocab_size, "has token ids up to"),
        ("max_position_embeddings", tokenizer.max_tokens, "makes prompts of"),
    ):
        if getattr(config, name) < least:
            shown = least - (name == "vocab_size")
            raise ConfigError(
                f"the text encoder has {name}={getattr(config, name)}, but the prompt tokenizer "
                f"{needs} {shown}; they belong to two models, copy both from one model"
            )
    frame = [tokenizer.bos_id, tokenizer.eos_id]
    if None in frame or tokenizer.encode([""])[0, :2].tolist() != frame:
        raise ConfigError(
            "the text encoder is CLIP's: its prompts begin with a start token, end with an end "
            "token and are padded after it; this prompt tokenizer does not do so, give CLIP's"
        )
    eos_id = config.eos_token_id
    if isinstance(eos_id, int) and eos_id not in (LEGACY_EOS_ID, tokenizer.eos_id):
        raise ConfigError(
            f"the text encoder has eos_token_id={eos_id}, but the end token of the prompt "
            f"tokenizer is {tokenizer.eos_id}; they belong to two models, copy both from one model"
        )


def clip_values(config: "CLIPTextConfig") -> dict[str, Any]:
    """Return the values that `clip_config` reads, JSON-ready."""
    return {name: getattr(config, name) for name in _READ}


def save_text_encoder(model: "TextModel", folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; transformers can read CLIP and T5, too."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as partial:
        with quiet(import_transformers()):
            model.save_pretrained(partial)
        # The config is written last: a folder that has one is complete.
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, root / path.name)
            give_usual_mode(root / path.name)


def read_encoder_config(root: Path, types: Sequence[str], *, kind: str) -> dict[str, Any]:
    """Return the content of `config.json`; CheckpointError for another kind of folder."""
    if not root.is_dir():
        raise CheckpointError(f"text encoder folder {root} does not exist; give a {kind} folder")
    if not (root / "config.json").is_file():
        nested = sorted(path.parent.name for path in root.glob("text_encoder*/config.json"))
        hint = f"pass subfolder={nested[0]!r}" if nested else f"give a {kind} text encoder folder"
        raise CheckpointError(f"{root} has no config.json; {hint}")
    try:
        values = read_settings(root / "config.json")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; it is not a transformers config") from error
    if values.get("model_type") not in types:
        raise CheckpointError(
            f"{root} has a model of type {values.get('model_type')!r}; one of "
            f"{', '.join(types)} is needed"
        )
    return values


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """Hide the progress bars and tables of transformers; errors are raised."""
    library = transformers.utils.logging
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def import_transformers() -> ModuleType:
    """Return the library; MissingExtraError names what to install."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError("transformers", "train") from error
    module: ModuleType = transformers
    return module
