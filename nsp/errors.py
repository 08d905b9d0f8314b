"""All errors that nsp raises on purpose.

NspError
├── ConfigError         a configuration value or option that is not allowed
├── DataError           a picture, caption or data set that cannot be used
├── CheckpointError     a checkpoint folder or state dict that is missing, corrupt or does not fit
├── TrainingError       a training run that cannot go on
├── FeedError           a tensor handed to a stage with the wrong name, shape or dtype
│   └── ProfileError    a size outside what an engine was built for
├── EngineError         an engine folder that is missing, damaged or for another device
├── BackendError        a runtime that is not installed, cannot run here, or failed
├── ExportError         an export step that failed
│   └── ParityError     an exported stage that does not compute what the PyTorch model computes
├── RegressionError     engines that became slower than a comparison allows
└── MissingExtraError   an optional package that is not installed

One line each: what was given, what is allowed, what to do next. `cli.py` prints that line and exits
with 1 (`ConfigError` from an option: 2); everything else is a bug and keeps its traceback.

Messages quote text from outside: file names, keys, texts of libraries. `one_line` makes sure that
no such text breaks the line, the terminal or the encoder.
"""

import re

from nsp.distribution import pip_install

_MAX_WORD = 300  # characters of one word: no file system allows a longer file name
_MAX_LINE = 3000
# Control characters, separators that break lines in terminals or editors, marks that reorder text,
# and lone surrogates (Python's form of bytes in a file name that are not UTF-8).
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return `text` as one line of limited length that any UTF-8 stream accepts.

    Characters that cannot be shown become escapes (`\\n`, `\\xe9`, `\\u2028`). Words of more than
    300 characters and lines of more than 3,000 lose their middle: the beginning of a message says
    what happened, and its end says what to do.
    """
    words = (_without_middle(word, _MAX_WORD) for word in text.strip().split(" "))
    return _without_middle(_UNSHOWN.sub(_escape, " ".join(words)), _MAX_LINE)


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - most // 2 + 1 :]}"


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":  # a byte that was not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


# The messages of libraries when no memory is left, each in an error type of its own: the loader,
# C++, PyTorch, Python's threads, ONNX Runtime and the operating system.
_MEMORY_HINTS = re.compile(
    "failed to map segment|bad_alloc|bad allocation|not enough memory|can't allocate memory|"
    "cannot allocate memory|failed to allocate memory|out of memory|can't start new thread|"
    "error return without exception set",
    re.IGNORECASE,
)


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, says that no memory is left."""
    cause: BaseException | None = error
    for _ in range(20):  # a chain of causes may be a circle
        if cause is None:
            return False
        if isinstance(cause, MemoryError) or _MEMORY_HINTS.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class NspError(Exception):
    """Base of all expected errors; `str(error)` is the one line a user reads."""

    def __str__(self) -> str:
        """Return the message as one line."""
        return one_line(super().__str__())


class ConfigError(NspError):
    """A configuration value, option or combination of them is not allowed."""


class DataError(NspError):
    """A picture, caption or data set cannot be used."""


class CheckpointError(NspError):
    """A checkpoint folder or state dict is missing, corrupt or does not fit."""


class TrainingError(NspError):
    """A training run cannot continue: its loss went wrong, and going back did not help."""


class FeedError(NspError):
    """A tensor handed to a stage has the wrong name, shape or dtype."""


class ProfileError(FeedError):
    """A size lies outside what an engine was built for."""


class EngineError(NspError):
    """An engine folder is missing, truncated, tampered with or for another device."""


class BackendError(NspError):
    """A runtime is not installed, cannot run here, or failed."""


class ExportError(NspError):
    """An export step failed."""


class ParityError(ExportError):
    """An exported stage does not compute what the PyTorch model computes."""


class RegressionError(NspError):
    """Engines became slower than a comparison allows."""


class MissingExtraError(NspError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: {pip_install(extra)}")
