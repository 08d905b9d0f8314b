"""What a caller may ask of a pipeline: every value is checked here, before anything is computed."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.values import shown


def prompt_texts(prompts: Any, *, allow_empty: bool = False) -> tuple[str, ...]:
    """Return the prompts of a list, an iterator or a NumPy array of texts; there may be none.

    Raises ConfigError naming the first that is no text or empty, which `allow_empty` lets pass.
    """
    if isinstance(prompts, str | bytes):
        raise ConfigError(f"prompts is a list of texts: prompts=[{shown(prompts)}]")
    ordered = not isinstance(prompts, Mapping | Set)
    try:
        texts = list(prompts) if ordered else None
    except TypeError:
        texts = None
    if texts is None:
        raise ConfigError(f"prompts is a list of texts, not {shown(prompts)}")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ConfigError(f"prompt {number} is {shown(text)}, not a text")
        if not text.strip() and not allow_empty:
            raise ConfigError(f"prompt {number} is empty; write what the image should show")
    return tuple(str(text) for text in texts)


def class_numbers(class_ids: Any) -> NDArray[np.int64]:
    """Return the class ids (B,) of a list or array of integers; there may be none."""
    try:
        ids = np.asarray(class_ids)
    except (TypeError, ValueError):  # rows of different lengths
        ids = np.array(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(f"class_ids is a list of integers, not {shown(class_ids)}")
    return ids.astype(np.int64)


def check_uniforms(uniforms: Any, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless these are float32 numbers in [0, 1) of that shape."""
    _check_array("uniforms", uniforms, shape, np.float32)
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):  # false for NaN, too
        raise ConfigError("uniforms must be in [0, 1): 1.0, negative numbers and NaN are not")


def check_forced_tokens(tokens: Any, shape: tuple[int, ...], vocab_size: int) -> None:
    """Raise ConfigError unless these are int64 codes, or -1, of that shape."""
    _check_array("forced_tokens", tokens, shape, np.int64)
    if tokens.min() < -1 or tokens.max() >= vocab_size:
        raise ConfigError(f"forced_tokens must be -1 (free) or in 0..{vocab_size - 1}")


def check_gumbel(noise: Any, shape: tuple[int, ...], *, more_smooth: bool) -> None:
    """Raise ConfigError unless this is finite float32 noise of that shape, and of use."""
    if not more_smooth:
        raise ConfigError("gumbel has no effect without more_smooth=True; leave one out")
    _check_array("gumbel", noise, shape, np.float32)
    if not bool(np.isfinite(noise).all()):
        raise ConfigError("gumbel must be finite: it holds NaN or infinity")


def _check_array(name: str, array: Any, shape: tuple[int, ...], dtype: type) -> None:
    expected = f"expected a NumPy array, {np.dtype(dtype)} {shape}"
    if not isinstance(array, np.ndarray):
        raise ConfigError(f"{name} is a {type(array).__name__}; {expected}")
    if array.shape != shape or array.dtype != dtype:
        raise ConfigError(f"{name} is {array.dtype} {array.shape}; {expected}")
