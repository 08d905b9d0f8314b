"""Named model sizes on a GPU, by everything that runs here: one benchmark per size and batch size.

    python -m nsp.benchmarks.gpu_suite [--sizes d16,d20,d24,d30,XL,500m] [--batch 1,8] [--quick]

For each: random weights -> engines of every target -> the contest of `nsp bench`, with all its
contenders. What cannot run here is reported with the reason. Models that draw one code at a time
have a table of the time per code beside the time in which its weights can be read. Where several
families have a size, FAMILY/SIZE says which one. `--device cpu --sizes tiny` runs the same path on
a CPU in a minute: a check of the suite itself.
"""

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click

from nsp.backends.available import availability
from nsp.backends.nvidia import find_gpu
from nsp.benchmarks.contest.contenders import Source, check_name
from nsp.benchmarks.contest.field import Asked, asked_for
from nsp.benchmarks.contest.measure import Bench
from nsp.benchmarks.contest.names import OTHERS
from nsp.benchmarks.contest.pictures import make_pictures
from nsp.benchmarks.contest.subject import Subject, load_subject
from nsp.benchmarks.options import BenchOptions, Effort
from nsp.benchmarks.random_model import find_size, write_random_model
from nsp.benchmarks.render.report import BenchReport, write_report
from nsp.console.common_options import FOLDER
from nsp.cores import num_threads
from nsp.errors import BackendError, ConfigError, NspError
from nsp.export.run import ExportOptions, export

logger = logging.getLogger(__name__)

# Those of the family that draws scales, then one of each that draws code by code.
SIZES = ("d16", "d20", "d24", "d30", "XL", "500m")
TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
_FIXED_BATCH = ("tensorrt", "tensorrt-rtx")  # their engines are built for one batch size


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What to measure."""

    output_dir: Path
    sizes: tuple[str, ...] = SIZES
    batches: tuple[int, ...] = (1, 8)
    quick: bool = False
    precision: str = "fp16"
    device: str = "cuda"
    only: tuple[str, ...] = (*TARGETS, *OTHERS)
    fresh_processes: bool = True
    engine_dir: Path | None = None  # where weights and engines stay; None: a temporary folder

    def __post_init__(self) -> None:
        """Check the names and numbers."""
        for size in self.sizes:
            find_size(size)
        for name in self.only:
            if name not in TARGETS:
                check_name(name)
        if not self.sizes or not self.batches or min(self.batches) < 1:
            raise ConfigError("give at least one size and one batch size of at least 1")

    @property
    def effort(self) -> Effort:
        """How much is measured of each size and batch size."""
        basis = BenchOptions(
            engine_dir=self.output_dir, output_dir=self.output_dir, quick=self.quick
        )
        processes = int(self.fresh_processes)
        rounds, warmup = (5, 1) if self.quick else (50, 5)
        return replace(
            Effort.of(basis),
            rounds=rounds,
            warmup=warmup,
            stability=None,
            engine_processes=processes,
            baseline_processes=processes,
        )


def run(options: SuiteOptions) -> Iterator[BenchReport]:
    """Yield the report of each size and batch size, written before the next one begins.

    Raises BackendError where there is no GPU, or no engines can be made.
    """
    _check_device(options.device)
    with ExitStack() as stack:
        root = options.engine_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for size, batch in itertools.product(options.sizes, options.batches):
            yield _measured(options, root / size, size, batch)


def _check_device(device: str) -> None:
    import torch

    if device != "cuda" or torch.cuda.is_available():
        return
    gpu = find_gpu()
    raise BackendError(
        "the GPU suite needs an NVIDIA GPU, but there is none; to check only the suite, run: "
        "python -m nsp.benchmarks.gpu_suite --device cpu --sizes tiny"
        if gpu is None
        else f"this PyTorch does not use the {gpu.name}; "
        "run: pip install --force-reinstall 'torch==2.13.*'"
    )


def _measured(options: SuiteOptions, folder: Path, size: str, batch: int) -> BenchReport:
    """Return the report of one size with one batch size."""
    checkpoint = folder / "checkpoint"
    write_random_model(checkpoint, *find_size(size))
    build = partial(_build, options, checkpoint, batch)
    targets = [name for name in options.only if name in TARGETS]
    subject, rest = _first_that_works(options, targets, build, checkpoint)
    bench_options = BenchOptions(
        engine_dir=subject.contender.source.path,
        output_dir=options.output_dir / f"{size.replace('/', '-')}-batch{batch}",
        checkpoint=checkpoint,
        batch_sizes=(batch,),
        contenders=(),
        quick=options.quick,
    )
    threads = num_threads()
    asked = [Asked(name, f"engines for {name}", partial(build, name)) for name in rest]
    asked += [asked_for(n, subject, threads) for n in options.only if n not in TARGETS]
    bench = Bench(bench_options, options.effort, threads, _log, tuple(asked))
    result = bench.measure(subject)
    pictures = make_pictures(subject, seed=bench_options.seed)
    return write_report(result, bench_options.output_dir, pictures=pictures)


def _log(event: object) -> None:
    logger.debug("%s", event)


def _first_that_works(
    options: SuiteOptions,
    targets: Sequence[str],
    build: Callable[[str], Source],
    checkpoint: Path,
) -> tuple[Subject, list[str]]:
    """Return the engines of the first target that can be built, and the other targets."""
    reasons = []
    for name in targets:
        try:
            source = build(name)
        except NspError as error:
            reasons.append(f"{name}: {error}")
            continue
        subject = load_subject(
            source.path,
            checkpoint=checkpoint,
            backend=source.backend,
            precision=options.precision,
            threads=num_threads(),
        )
        return subject, [each for each in targets if each != name]
    raise BackendError("no engines can be made here: " + ("; ".join(reasons) or "none are asked"))


def _build(options: SuiteOptions, checkpoint: Path, batch: int, target: str) -> Source:
    """Return the engines of a target, exported unless they are there unchanged.

    Raises NspError where they cannot run or be built here.
    """
    backend, fixed = target.replace("-", "_"), target in _FIXED_BATCH
    state = availability(target)
    if not state.works or (options.device == "cuda" and state.device != "cuda"):
        raise BackendError(state.reason + (f"; run: {state.install}" if state.install else ""))
    folder = checkpoint.parent / (f"{target}-b{batch}" if fixed else target)
    logger.info("building %s", folder)
    export(
        ExportOptions(
            checkpoint=str(checkpoint),
            engine_dir=str(folder),
            precisions=(options.precision,),
            targets=(target,),
            max_batch=max(options.batches) if not fixed else batch,
            static_batch=fixed,
            gpu_archs=("current",) if backend == "tensorrt_rtx" else (),
        )
    )
    kept = {"precision": options.precision, "device": options.device}
    return Source(label=target, path=folder, backend=target, options=kept)


def _numbers(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.UsageError(f"--batch {value!r}: give numbers with commas, as in 1,8") from None


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


@click.command()
@click.option("--sizes", default=",".join(SIZES), show_default=True, help="Model sizes.")
@click.option("--batch", default="1,8", show_default=True, help="Images per call.")
@click.option("--precision", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16")
@click.option("--only", default=",".join((*TARGETS, *OTHERS)), help="Contenders.  [default: all]")
@click.option("--quick", is_flag=True, help="5 rounds instead of 50.")
@click.option(
    "--engine-dir", type=FOLDER, help="Folder that keeps weights and engines for later runs."
)
@click.option("--output-dir", type=FOLDER, default="outputs/gpu_suite", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(
    *,
    sizes: str,
    batch: str,
    precision: str,
    only: str,
    quick: bool,
    engine_dir: Path | None,
    output_dir: Path,
    device: str,
) -> None:
    """Check parity and measure speed of model sizes on this machine's GPU."""
    from nsp.console.terminal import results_console

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options = SuiteOptions(
            sizes=_names(sizes),
            batches=_numbers(batch),
            precision=precision if device == "cuda" else "fp32",
            only=_names(only),
            quick=quick,
            engine_dir=engine_dir,
            output_dir=output_dir,
            device=device,
        )
        for report in run(options):
            report.render(results_console())
            click.echo(f"data: {report.json_path}")
    except NspError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
