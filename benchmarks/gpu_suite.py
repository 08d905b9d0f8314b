"""`var` on a GPU: parity and speed of everything that runs here, each beside its ceiling.

    python -m nsp.benchmarks.gpu_suite [--sizes d16,d20,d24,d30] [--batch 1,8] [--quick]

For every size and batch: random weights -> engines -> a fresh process each (first image, memory) ->
parity with float32 PyTorch -> interleaved rounds. What cannot run here is reported with the reason.
`--device cpu --sizes tiny` runs the same path on a CPU in a minute: a check of the suite itself.
"""

import itertools
import json
import logging
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from nsp.backends.nvidia import find_gpu
from nsp.benchmarks.ceilings.cpu import Environment
from nsp.benchmarks.ceilings.gpu import Clock, measure_gpu_ceilings
from nsp.benchmarks.gpu_contest import contest
from nsp.benchmarks.gpu_contestants import ENTRIES, Place
from nsp.benchmarks.gpu_results import GPU_SCHEMA, Contest, SuiteResult, markdown
from nsp.benchmarks.random_model import random_config
from nsp.console.command_line import FOLDER
from nsp.cores import num_threads
from nsp.errors import BackendError, ConfigError, NspError
from nsp.files import write_file

JSON_NAME, MARKDOWN_NAME = "gpu_suite.json", "gpu_suite.md"


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What to measure."""

    output_dir: Path
    sizes: tuple[str, ...] = ("d16", "d20", "d24", "d30")
    batches: tuple[int, ...] = (1, 8)
    quick: bool = False
    precision: str = "fp16"
    device: str = "cuda"
    only: tuple[str, ...] = tuple(ENTRIES)
    fresh_processes: bool = True
    engine_dir: Path | None = None  # where weights and engines stay; None: a temporary folder
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        """Check the names and numbers."""
        for name in self.sizes:
            random_config(name)
        if unknown := [name for name in self.only if name not in ENTRIES]:
            raise ConfigError(f"unknown contestant {unknown[0]!r}; known: {', '.join(ENTRIES)}")
        if not self.sizes or not self.batches or min(self.batches) < 1:
            raise ConfigError("give at least one size and one batch size of at least 1")

    @property
    def rounds(self) -> tuple[int, int]:
        """Rounds to warm up, and to measure."""
        return (1, 5) if self.quick else (5, 50)


def run(options: SuiteOptions) -> SuiteResult:
    """Return everything measured, written to `output_dir`; BackendError where there is no GPU."""
    if options.device == "cuda" and not torch.cuda.is_available():
        gpu = find_gpu()
        raise BackendError(
            "the GPU suite needs an NVIDIA GPU, but there is none; to check only the suite, run: "
            "python -m nsp.benchmarks.gpu_suite --device cpu --sizes tiny"
            if gpu is None
            else f"this PyTorch does not use the {gpu.name}; "
            "run: pip install --force-reinstall 'torch==2.13.*'"
        )
    began, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    with ExitStack() as stack:
        # Convolutions as exact as the products beside them, their kernels chosen by trial.
        stack.enter_context(torch.backends.cudnn.flags(True, benchmark=True, allow_tf32=False))
        root = options.engine_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ceilings = measure_gpu_ceilings(options.device, options.precision, quick=options.quick)
        contests: list[Contest] = []
        for size, batch in itertools.product(options.sizes, options.batches):
            place = Place(
                folder=root / size,
                batch=batch,
                precision=options.precision,
                device=options.device,
                compiler=options.compiler,
            )
            contests.append(
                contest(
                    size,
                    place,
                    ceilings,
                    only=options.only,
                    fresh_processes=options.fresh_processes,
                    rounds=options.rounds,
                )
            )
            result = SuiteResult(
                schema_version=GPU_SCHEMA,
                created=created,
                seconds=time.perf_counter() - began,
                options=_plain(options),
                clock=Clock(options.device).name,
                environment=Environment.read(threads=num_threads()),
                ceilings=ceilings,
                contests=tuple(contests),
            )
            _write(result, options.output_dir)  # after each: a later one may end the run
    return result


def _write(result: SuiteResult, folder: Path) -> None:
    with write_file(folder / JSON_NAME) as partial:
        partial.write_text(json.dumps(result.to_dict(), allow_nan=False) + "\n", encoding="utf-8")
    with write_file(folder / MARKDOWN_NAME) as partial:
        partial.write_text(markdown(result), encoding="utf-8")


def _plain(options: SuiteOptions) -> dict[str, Any]:
    """Return the options, JSON-ready; folders are not part of a result."""
    kept = ("sizes", "batches", "quick", "precision", "device", "only", "compiler")
    values = {name: getattr(options, name) for name in kept}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}


def _numbers(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.UsageError(f"--batch {value!r}: give numbers with commas, as in 1,8") from None


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


@click.command()
@click.option("--sizes", default="d16,d20,d24,d30", show_default=True, help="Model sizes.")
@click.option("--batch", default="1,8", show_default=True, help="Images per call.")
@click.option("--precision", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16")
@click.option("--only", default=",".join(ENTRIES), show_default=True, help="Contestants.")
@click.option("--quick", is_flag=True, help="5 rounds instead of 50.")
@click.option(
    "--engine-dir", type=FOLDER, help="Folder that keeps weights and engines for later runs."
)
@click.option("--output-dir", type=FOLDER, help="[default: benchmarks/results]")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(
    *,
    sizes: str,
    batch: str,
    precision: str,
    only: str,
    quick: bool,
    engine_dir: Path | None,
    output_dir: Path | None,
    device: str,
) -> None:
    """Check parity and measure speed of `var` on this machine's GPU."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    on_gpu = device == "cuda"
    folder = output_dir or Path("benchmarks/results" if on_gpu else "outputs/gpu_suite")
    try:
        options = SuiteOptions(
            sizes=_names(sizes),
            batches=_numbers(batch),
            precision=precision if on_gpu else "fp32",
            only=_names(only),
            quick=quick,
            engine_dir=engine_dir,
            output_dir=folder,
            device=device,
            compiler="inductor" if on_gpu else "aot_eager",
        )
        result = run(options)
    except NspError as error:
        raise click.ClickException(str(error)) from error
    click.echo(markdown(result))
    click.echo(f"data: {folder / JSON_NAME}")


if __name__ == "__main__":
    main()
