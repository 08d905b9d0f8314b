"""`python -m nsp.benchmarks.next_scale`: time and memory of growing one picture, scale by scale.

With random weights of a named size in PyTorch, or with engines exported from such a model: what the
sizes cost, not what pictures show.
"""

import json
import logging
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import click

from nsp.benchmarks.ceilings.cpu import Environment
from nsp.config import Config
from nsp.console.command_line import FOLDER
from nsp.cores import num_threads
from nsp.errors import ConfigError, NspError
from nsp.files import read_json, write_file
from nsp.pipeline.pipeline import Pipeline, load_pipeline

logger = logging.getLogger(__name__)

SCHEMA = 1
_CAPTIONS = ("a beautiful landscape with mountains and a lake", "red apple", "two-hump camel")
_NOTES = {"made_by": "nsp.benchmarks.next_scale"}
_TEXT_ENCODER = {"vocab_size": 560, "depth": 12, "num_heads": 12}


@dataclass(frozen=True, kw_only=True)
class Part(Config):
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
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        """Check the schema."""
        if self.schema_version != SCHEMA:
            raise ConfigError(
                f"result has schema_version {self.schema_version}, but this nsp reads {SCHEMA}; "
                "run: python -m nsp.benchmarks.next_scale"
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
        raise ConfigError(
            f"{path} is not a result of nsp.benchmarks.next_scale ({error})"
        ) from error


def measure(
    size: str, *, threads: int, engine_dir: Path | None = None, save_to: Path | None = None
) -> Growth:
    """Return the parts of one call, in order: weights, every scale, decoder.

    Nothing is warmed up: at these sizes a first call is as slow as the next. Without `engine_dir`
    the model is a new one of random weights, written to the checkpoint `save_to` if that is given.
    Raises ConfigError for an unknown size, EngineError or BackendError for engines that do not run.
    """
    environment, clock = Environment.read(threads=threads), _Clock()
    if engine_dir is not None:
        pipeline = load_pipeline(engine_dir, num_threads=threads)
    else:
        pipeline = _new_pipeline(size, threads, save_to)
    parts, step = [clock.part("weights")], None
    for step in pipeline.stream(prompts=[_CAPTIONS[0]], seed=42):
        side = pipeline.config.sides[step.scale]
        parts.append(clock.part(f"latent {side}x{side}"))
        logger.info("%s", parts[-1])
    assert step is not None
    image = step.decode()
    parts.append(clock.part(f"decoder, {image.shape[-1]} px"))
    return Growth(
        schema_version=SCHEMA,
        size=size,
        backend=pipeline.backend.name,
        precision=pipeline.precision or "fp32",
        environment=environment,
        parts=tuple(parts),
    )


def _new_pipeline(size: str, threads: int, save_to: Path | None) -> Pipeline:
    """Return a model of random weights."""
    import torch

    from nsp.artifacts.systems import save_checkpoint
    from nsp.data.sources import ImageSource, Sample
    from nsp.families.next_scale.config import SIZES
    from nsp.family.registry import family
    from nsp.pipeline.pipeline import torch_pipeline

    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = SIZES[size]
    samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in _CAPTIONS)
    heads = 12 if config.text.text_width % 12 == 0 else 2
    encoder = {**_TEXT_ENCODER, "num_heads": heads}
    record = family("next_scale")
    system = record.learner.new_system(config, encoder, ImageSource(samples, (), ()))
    if save_to is not None:
        save_checkpoint(save_to, system, notes=_NOTES, sampling={})
    return torch_pipeline(record, system, device="cpu")


class _Clock:
    """Time since the last part."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def part(self, name: str) -> Part:
        """Return what was used since the last call."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = Part(
            name=name,
            seconds=round(wall - self._wall, 3),
            cpu_seconds=round(cpu - self._cpu, 3),
            # In KiB on Linux.
            peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        )
        self._wall, self._cpu = wall, cpu
        return found


def growth_table(growth: Growth) -> str:
    """Return the table for people."""
    environment = growth.environment
    rows = [
        f"| {p.name} | {p.seconds:.2f} | {p.cpu_seconds:.2f} | {p.peak_gib:.2f} |"
        for p in growth.parts
    ]
    return "\n".join(
        [
            f"One picture of family `next_scale`, size `{growth.size}`, random weights, guidance "
            f"on: {growth.backend} {growth.precision}, {environment.threads} cores of an "
            f"{environment.cpu}. {growth.picture_s:.0f} s and {growth.peak_gib:.1f} GiB in all.",
            "",
            "| part | seconds | processor seconds | peak memory so far, GiB |",
            "|---|---:|---:|---:|",
            *rows,
        ]
    )


@click.command()
@click.option("--size", default="sdxl", show_default=True, help="sdxl, emoji or tiny.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="CPU threads, as for nsp bench."
)
@click.option("--engine-dir", type=FOLDER, help="Engines of such a model, instead of PyTorch.")
@click.option(
    "--checkpoint-dir", type=FOLDER, help="Folder that keeps the weights, to export them."
)
@click.option("--output-dir", type=FOLDER, default=Path("outputs/bench"), show_default=True)
def main(
    *,
    size: str,
    threads: int | None,
    engine_dir: Path | None,
    checkpoint_dir: Path | None,
    output_dir: Path,
) -> None:
    """Measure one picture and write next_scale.json and next_scale.md."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if engine_dir is not None and checkpoint_dir is not None:
        raise click.UsageError("--checkpoint-dir is for new weights, but --engine-dir has its own")
    try:
        growth = measure(
            size, threads=num_threads(threads), engine_dir=engine_dir, save_to=checkpoint_dir
        )
    except NspError as error:
        raise click.ClickException(str(error)) from error
    output_dir.mkdir(parents=True, exist_ok=True)
    with write_file(output_dir / "next_scale.json") as partial:
        partial.write_text(json.dumps(growth.to_dict(), indent=1) + "\n")
    table = growth_table(growth)
    with write_file(output_dir / "next_scale.md") as partial:
        partial.write_text(table + "\n")
    click.echo(table)


if __name__ == "__main__":
    main()
