"""Every error nsp raises on purpose.

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
"""


class NspError(Exception):
    """Base of all expected errors; `str(error)` is the one line a user reads."""


class ConfigError(NspError):
    """A configuration value, option or combination of them is not allowed."""


class DataError(NspError):
    """A picture, caption or data set cannot be used."""


class CheckpointError(NspError):
    """A checkpoint folder or state dict is missing, corrupt or does not fit."""


class TrainingError(NspError):
    """A training run cannot go on: its loss went wrong, and going back did not help."""


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
        super().__init__(f"{package} is not installed; run: pip install 'nsp[{extra}]'")
