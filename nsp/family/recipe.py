"""The configuration of a training run: data, phases, optimizer; stored with every checkpoint."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from nsp.config import Config
from nsp.errors import ConfigError

SCHEDULES = re.compile(r"constant|cos|lin|lin0|lin00|exp|wsd|lin0\.\d+")  # for the learning rate
LOCAL = "local"  # MLflow's records are in the run folder
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # that MLflow writes to
_SCHEMES = ("file", "http", "https", "databricks", *DATABASES)
MAX_SEED = 2**32 - 1  # the limit of NumPy's global generator
_COUNTS = (
    "steps",
    "batch_size",
    "accumulate",
    "sample_every",
    "checkpoint_every",
    "keep_last",
    "validate_every",
    "log_every",
)
# The fields of a phase that a resumed run may change: its length, computation and reports.
FREE_OF_PHASE = (*(name for name in _COUNTS if name != "batch_size"), "guard")
_LENGTHS = ("steps", "sample_every", "checkpoint_every", "validate_every")

Steps: TypeAlias = int


@dataclass(frozen=True, kw_only=True)
class Epochs(Config):
    """A length in passes over the pictures; it becomes steps as soon as the data are open."""

    epochs: int

    def __post_init__(self) -> None:
        """Check the count."""
        self.check_counts("length", "epochs")


def counted(length: Steps | Epochs) -> Steps:
    """Return the steps of a length that `RunConfig.in_steps` has counted."""
    assert isinstance(length, int), "epochs are counted before a phase begins"
    return length


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW and its schedules."""

    lr: float  # peak learning rate for the given batch size
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_end: float | None = None  # None: constant
    schedule: str = "lin0"
    warmup_steps: Steps | Epochs = 0
    warmup_start: float = 0.005
    final_ratio: float = 0.01
    grad_clip: float = 2.0

    def __post_init__(self) -> None:
        """Check the schedule's name and the ranges of numbers; nan and inf are not allowed."""
        if not SCHEDULES.fullmatch(self.schedule):
            raise ConfigError(
                f"schedule {self.schedule!r} is unknown; known: constant, cos, lin, lin0, lin00, "
                "exp, wsd, and lin<fraction> such as lin0.4"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {self.betas}")
        ends = () if self.weight_decay_end is None else ("weight_decay_end",)
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} must be a finite number above 0, got {getattr(self, name)}"
                )
        warmup = () if isinstance(self.warmup_steps, Epochs) else ("warmup_steps",)
        for name in ("weight_decay", *warmup, *ends):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} must be a finite number of at least 0, got {getattr(self, name)}"
                )
        for name in ("warmup_start", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.schedule == "exp" and self.final_ratio == 0:
            raise ConfigError("schedule exp never reaches 0; give a final_ratio above 0")


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Config):
    """When a run goes back to its last saved step, and when it gives up.

    It goes back when the loss or the gradient is not finite, and when a reported loss exceeds
    `spike_ratio` times the median of the last `window` reported ones. The batches since the saved
    step are then left out, so the run does not meet the same ones again. After `max_rollbacks` in
    one phase, or with nothing saved yet, it stops with an error.
    """

    spike_ratio: float = 4.0  # 0: only values that are not finite count
    window: int = 50  # reports; spikes are detected after half as many
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.spike_ratio != 0 and not 1 < self.spike_ratio < math.inf:
            raise ConfigError(
                f"guard.spike_ratio must be 0 (off) or above 1, got {self.spike_ratio}"
            )
        if self.window < 2 or self.max_rollbacks < 0:
            raise ConfigError("guard needs a window of at least 2 and max_rollbacks of at least 0")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Low-rank adapters instead of full training (Hu et al. 2021, arXiv:2106.09685), with peft.

    Checkpoint folders have the weights with the adapters merged in; the adapters alone are in
    lora/ of the phase's folder.
    """

    rank: int = 16
    alpha: int = 32  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: tuple[str, ...]  # ends of the names of linear layers, such as "mat_qkv"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("lora needs rank >= 1, alpha >= 1 and dropout in [0, 1)")
        if not self.targets:
            raise ConfigError("lora.targets names no layer; give ends of names of linear layers")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(Config):
    """One phase of a run: the family's objective of this name, its length and its settings.

    As a dictionary its length is `steps: 400` or `epochs: 3`, and another length is a number of
    steps or `{epochs: 1}`.
    """

    name: str
    steps: Steps | Epochs
    batch_size: int  # pictures per optimizer step, over all devices and micro-batches
    accumulate: int = 1  # micro-batches of a step on each device
    optimizer: OptimizerConfig
    ema_decay: float = 0.0  # 0: no moving average
    lora: LoraConfig | None = None  # None: all weights of the objective learn
    guard: GuardConfig = field(default_factory=GuardConfig)
    objective: dict[str, object] = field(default_factory=dict)  # settings of the family's objective
    sample_every: Steps | Epochs = 500
    checkpoint_every: Steps | Epochs = 250
    keep_last: int = 2  # saved steps kept in addition to the best one
    validate_every: Steps | Epochs = 500  # on the held-out split, if the data has one
    log_every: int = 10

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, Epochs) and value < 1:
                raise ConfigError(f"phase {self.name}: {name} must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"phase {self.name}: ema_decay must be in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary; a length in epochs has the key `epochs` instead of `steps`."""
        values = super().to_dict()
        if not isinstance(self.steps, Epochs):
            return values
        return {("epochs" if n == "steps" else n): values[n] for n in values} | self.steps.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Return the phase that the dictionary describes; it has one of `steps` and `epochs`."""
        if isinstance(values, Mapping) and "epochs" in values:
            if "steps" in values:
                name = values.get("name")
                raise ConfigError(f"phase {name}: steps and epochs are both given; choose one")
            rest = {name: value for name, value in values.items() if name != "epochs"}
            values = {**rest, "steps": {"epochs": values["epochs"]}}
        return super().from_dict(values)

    def in_steps(self, num_pictures: int | None) -> Self:
        """Return the phase with all lengths in steps; an epoch is cut as in `StepSampler`.

        Raises ConfigError for a length in epochs when the number of pictures is not known.
        """
        lengths = {name: getattr(self, name) for name in _LENGTHS}
        in_epochs = {n: each.epochs for n, each in lengths.items() if isinstance(each, Epochs)}
        warmup = self.optimizer.warmup_steps
        if (in_epochs or isinstance(warmup, Epochs)) and num_pictures is None:
            place = next(iter(in_epochs), "optimizer.warmup_steps")
            raise ConfigError(
                f"phase {self.name}: a stream has no epochs; give --steps instead of options in "
                f"epochs, or --set {self.name}.{place}=STEPS"
            )
        epoch = max((num_pictures or 0) // self.batch_size, 1)
        steps: dict[str, Any] = {name: count * epoch for name, count in in_epochs.items()}
        if isinstance(warmup, Epochs):
            counted_up = dataclasses.replace(self.optimizer, warmup_steps=warmup.epochs * epoch)
            steps["optimizer"] = counted_up
        return dataclasses.replace(self, **steps)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """The pictures, their size and their augmentation."""

    source: str = "emoji"  # 'emoji', a .tar, a folder, hf:NAME_OR_FOLDER[:SPLIT], or shards
    stream: bool = False  # read shards (paths or URLs) in order, without listing them first
    validation: str | None = None  # pictures to validate on, instead of the held-out ones
    val_share: float | None = None  # of the pictures, held out if they have no validation split
    heldout: str | None = None  # list (name<TAB>caption) of samples that must not be trained on
    token_cache: str | None = None  # made by `nsp data cache`; None: the run makes its own
    crop: bool = False  # resize the short side to 1.125 x size, then crop at random
    flip: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers must be at least 0, got {self.num_workers}")
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise ConfigError(f"data.val_share must be between 0 and 1, got {self.val_share}")
        if self.val_share is not None and (self.validation is not None or self.stream):
            other = "a stream is not listed" if self.stream else "data.validation is also given"
            raise ConfigError(f"data.val_share divides listed pictures, but {other}; omit one")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Config):
    """Where a run is recorded; nothing here changes the training."""

    tensorboard: bool | None = None  # None: if it is installed
    log_dir: str | None = None  # for TensorBoard; None: in the run folder
    log_name: str = "tensorboard"  # of TensorBoard's folder in the run folder
    names: dict[str, str] = field(default_factory=dict)  # under which numbers are recorded
    mlflow: str | None = None  # "local": in the run folder; else a folder or a tracking URI
    experiment: str = "nsp"  # name of the MLflow experiment
    run_name: str | None = None  # name in MLflow; None: the run folder's name
    tags: dict[str, str] = field(default_factory=dict)  # of the run in MLflow
    log_with: tuple[str, ...] = ()  # further trackers, by accelerate's names, such as wandb

    def __post_init__(self) -> None:
        """Check the address; a password in it would be stored with every checkpoint."""
        if self.mlflow is not None and "://" in self.mlflow:
            try:
                address = urlsplit(self.mlflow)
                scheme, password = address.scheme.split("+")[0], address.password
            except ValueError as error:
                raise ConfigError(f"mlflow: the address is not a URI ({error})") from error
            if scheme not in _SCHEMES:
                raise ConfigError(
                    f"mlflow: {scheme}:// is not a tracking address; give '{LOCAL}', a folder, "
                    f"or a URI of one of {', '.join(_SCHEMES)}"
                )
            if password is not None:
                raise ConfigError(
                    "mlflow: the address contains a password; set MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD instead"
                )
        for name in ("log_dir", "log_name", "mlflow", "experiment", "run_name"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} must not be empty")
        if Path(self.log_name).name != self.log_name or self.log_name == "..":
            raise ConfigError(
                f"log_name {self.log_name!r} is not the name of a folder; for another place give "
                "log_dir"
            )

    def tensorboard_dir(self, folder: Path) -> Path:
        """Return the folder for TensorBoard's files of the run in `folder`."""
        return folder / self.log_name if self.log_dir is None else Path(self.log_dir)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A complete run: everything that decides its result."""

    family: str
    model: dict[str, object]  # the family's configuration as a dictionary
    text_encoder: dict[str, object] = field(default_factory=dict)  # settings of a new text encoder
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[PhaseConfig, ...]
    sampling: dict[str, object] = field(default_factory=dict)  # settings that suit the model
    checkpoint_dir: str | None = None  # for saved steps; None: in the run folder
    copy_dir: str | None = None  # for a second copy of every saved step, such as a mounted bucket
    start_from: str | None = None  # checkpoint folder whose weights the run starts with
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"  # how several processes share the work
    compile: bool | None = False  # torch.compile for the repeated parts; None: on a GPU alone
    activation_checkpointing: bool = False  # recompute activations instead of keeping them
    anyway: bool = False  # go on although a phase's result is not good enough to build on
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Check that phases have distinct names and that every library accepts the seed."""
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names) or not names:
            raise ConfigError(f"phases must be one or more with distinct names, got {names}")
        if isinstance(self.seed, bool) or not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be a whole number from 0 to {MAX_SEED}, got {self.seed}")

    def in_steps(self, num_pictures: int | None) -> Self:
        """Return the run with all lengths in steps; `num_pictures` is None for a stream."""
        return dataclasses.replace(
            self, phases=tuple(phase.in_steps(num_pictures) for phase in self.phases)
        )
