"""Results of an earlier program that timed one large picture, part by part; they are still read.

Nothing writes them any more: `nsp bench` measures every family.
"""

from dataclasses import dataclass
from pathlib import Path

from nsp.benchmarks.record.environment import Environment
from nsp.config import Config
from nsp.errors import ConfigError
from nsp.files import read_json

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class GrowthPart(Config):
    """One part of the way, by wall clock and by this process's share of the processors."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_gib: float  # resident memory of the process, the most until the part's end


@dataclass(frozen=True, kw_only=True)
class Growth(Config):
    """One picture, from weights on disk or drawn at random to pixels."""

    schema_version: int
    size: str
    backend: str
    precision: str
    environment: Environment
    parts: tuple[GrowthPart, ...]

    def __post_init__(self) -> None:
        """Check the schema."""
        if self.schema_version != SCHEMA:
            raise ConfigError(
                f"result has schema_version {self.schema_version}, but this nsp reads {SCHEMA}; "
                "measure again: nsp bench"
            )

    @property
    def picture_s(self) -> float:
        """Time of all but the weights."""
        return sum(part.seconds for part in self.parts[1:])

    @property
    def peak_gib(self) -> float:
        """The most memory."""
        return self.parts[-1].peak_gib


def read_growth(path: Path) -> Growth:
    """Return the result in a file; raise ConfigError naming the file and what is wrong."""
    try:
        return Growth.from_dict(read_json(path))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path} is not a result of one large picture ({error})") from error


def growth_table(growth: Growth) -> str:
    """Return the table for people."""
    environment = growth.environment
    rows = [
        f"| {p.name} | {p.seconds:.2f} | {p.cpu_seconds:.2f} | {p.peak_gib:.2f} |"
        for p in growth.parts
    ]
    return "\n".join(
        [
            f"One picture of size `{growth.size}`, random weights, guidance "
            f"on: {growth.backend} {growth.precision}, {environment.threads} cores of an "
            f"{environment.cpu}. {growth.picture_s:.0f} s and {growth.peak_gib:.1f} GiB in all. "
            "The run does not say whether it can be trusted: the load average at its start was "
            f"{environment.load_average}.",
            "",
            "| part | seconds | processor seconds | peak memory so far, GiB |",
            "|---|---:|---:|---:|",
            *rows,
        ]
    )
