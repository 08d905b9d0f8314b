"""`python -m benchmarks.next_scale`: the time and memory of growing one picture, scale by scale.

With random weights of a named size, in PyTorch: what the sizes cost, not what pictures show.
"""

import json
import logging
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nsp.errors import ConfigError
from nsp.files import write_file

logger = logging.getLogger(__name__)

_CAPTIONS = ("a beautiful landscape with mountains and a lake", "red apple", "two-hump camel")
_TEXT_ENCODER = {"vocab_size": 560, "depth": 12, "num_heads": 12}


@dataclass(frozen=True)
class Part:
    """One part of the way, by wall clock and by this process's share of the processors."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_rss_gib: float  # of the process until its end


def measure(size: str, *, num_threads: int, batch: int = 1) -> list[Part]:
    """Return the parts of one call, in order: weights, every scale, decoder.

    Nothing is warmed up: at these sizes a first call is as slow as the next. Raises ConfigError for
    an unknown size.
    """
    import torch

    from nsp.data.sources import ImageSource, Sample
    from nsp.families.next_scale.config import SIZES
    from nsp.families.next_scale.training import new_system
    from nsp.families.registry import family
    from nsp.runtime.pipeline import torch_pipeline

    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    config, parts = SIZES[size], list[Part]()
    clock = _Clock()
    samples = tuple(Sample(name=c, caption=c, class_id=None) for c in _CAPTIONS)
    heads = {**_TEXT_ENCODER, "num_heads": 12 if config.text.text_width % 12 == 0 else 2}
    system = new_system(config.to_dict(), heads, ImageSource(samples, (), ()))
    pipeline = torch_pipeline(family("next_scale"), system, device="cpu")
    parts.append(clock.part("weights"))
    step = None
    for step in pipeline.stream(prompts=[_CAPTIONS[0]] * batch, seed=42):
        side = config.sides[step.scale]
        parts.append(clock.part(f"latent {side}x{side}"))
        logger.info("%s", parts[-1])
    assert step is not None
    image = step.decode()
    parts.append(clock.part(f"decoder, {image.shape[-1]} px"))
    return parts


class _Clock:
    """Time since the last part."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def part(self, name: str) -> Part:
        """Return what was used since the last call."""
        wall, cpu = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        found = Part(name, round(wall - self._wall, 3), round(cpu - self._cpu, 3), round(peak, 3))
        self._wall, self._cpu = wall, cpu
        return found


def markdown(size: str, num_threads: int, parts: list[Part]) -> str:
    """Return the table for people."""
    rows = [
        f"| {p.name} | {p.seconds:.2f} | {p.cpu_seconds:.2f} | {p.peak_rss_gib:.2f} |"
        for p in parts
    ]
    return "\n".join(
        [
            f"`{size}`, random weights, PyTorch fp32, {num_threads} threads, batch 1, guidance 2.",
            "",
            "| part | seconds | processor seconds | peak memory so far, GiB |",
            "|---|---:|---:|---:|",
            *rows,
            "",
        ]
    )


@click.command()
@click.option("--size", default="sdxl", show_default=True, help="sdxl, emoji or tiny.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--output-dir", type=click.Path(path_type=Path), default=Path("outputs/bench"))
def main(size: str, threads: int, output_dir: Path) -> None:
    """Measure and write next_scale.json and next_scale.md."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parts = measure(size, num_threads=threads)
    record: dict[str, Any] = {"size": size, "threads": threads, "parts": [vars(p) for p in parts]}
    output_dir.mkdir(parents=True, exist_ok=True)
    with write_file(output_dir / "next_scale.json") as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    table = markdown(size, threads, parts)
    with write_file(output_dir / "next_scale.md") as partial:
        partial.write_text(table)
    click.echo(table)


if __name__ == "__main__":
    main()
