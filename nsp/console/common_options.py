"""Options that several nsp commands have, and how their values are read."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from nsp import files, values
from nsp.cores import MAX_THREADS
from nsp.errors import ConfigError

_F = TypeVar("_F", bound=Callable[..., Any])


def _be_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.obj.verbose |= value


class _Path(click.Path):
    """A path that is possible on this system; click itself would look it up and fail."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the path; an impossible one is a wrong usage that names the option."""
        try:
            values.path("the path", value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


FOLDER = _Path(path_type=Path)
FILE = _Path(path_type=Path, exists=True, dir_okay=False)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**63 - 1)

verbose_option = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_be_verbose,
    help="Log details, and show tracebacks of errors.",
)


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from nsp.distribution import version

        click.echo(" ".join(filter(None, (context.info_name, version()))))
        context.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
engine_dir_option = click.option(
    "--engine-dir", type=FOLDER, help="Folder of exported engines.  [default: engines]"
)
lora_option = click.option(
    "--lora", type=FOLDER, help="Adapter to merge into --checkpoint: lora/ of a phase, or a file."
)
no_verify_option = click.option(
    "--no-verify",
    is_flag=True,
    help="Accept files that differ from their recorded SHA-256, such as files edited by hand.",
)

backend_option = click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="auto (the fastest that works here), torch, onnxruntime, tensorrt or tensorrt-rtx.",
)


def threads_option(help_text: str) -> Callable[[_F], _F]:
    """Return the option --threads; without it, `nsp.cores` decides."""
    default = "[default: OMP_NUM_THREADS, or every core that this process may use]"
    return click.option(
        "--threads", type=click.IntRange(1, MAX_THREADS), help=f"{help_text}  {default}"
    )


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let PyTorch compute with `threads` threads until the block ends; None changes nothing."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seed_option(help_text: str) -> Callable[[_F], _F]:
    """Return the option --seed, in the range that NumPy's Philox generators accept."""
    return click.option("--seed", type=SEED, default=0, show_default=True, help=help_text)


PRECISIONS = ("fp16", "bf16", "fp32", "int8")


def precision_options(help_text: str) -> Callable[[_F], _F]:
    """Return the flags --fp16, --bf16, --fp32 and --int8; `given_precisions` reads them."""

    def add(verb: _F) -> _F:
        for name in reversed(PRECISIONS):
            verb = click.option(f"--{name}", is_flag=True, help=help_text.format(name))(verb)
        return verb

    return add


def given_precisions(options: dict[str, Any]) -> tuple[str, ...]:
    """Return the requested precisions; their flags are removed from `options`."""
    return tuple(name for name in PRECISIONS if options.pop(name))


def one_precision(options: dict[str, Any]) -> str | None:
    """Return the requested precision, or None, as `given_precisions`; ConfigError for two."""
    given = given_precisions(options)
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} are both given; choose one")
    return given[0] if given else None


def checkpoint_option(help_text: str) -> Callable[[_F], _F]:
    """Return the option --checkpoint."""
    return click.option("--checkpoint", type=FOLDER, help=help_text)


def output_dir_option(default: str, help_text: str) -> Callable[[_F], _F]:
    """Return the option --output-dir."""
    return click.option(
        "--output-dir", type=FOLDER, default=default, show_default=True, help=help_text
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ConfigError when it contains something else."""
    try:
        return files.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} does not contain a JSON object: {error}") from error
