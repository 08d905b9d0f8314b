"""How every nsp command behaves: exit codes, errors in one line, logs on stderr, shared options.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An expected error (NspError, a file
that cannot be read or written) is one line; a bug keeps its traceback.
"""

import dataclasses
import errno
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nsp import files
from nsp.errors import ConfigError, MissingExtraError, NspError, one_line

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

# Optional package -> the extra that brings it. Modules that need one import it at their head, as
# nothing of theirs works without it; this is where that becomes advice.
_EXTRAS = {
    "torch": "export",
    "transformers": "export",
    "diffusers": "export",
    "onnx": "export",
    "onnxscript": "export",
    "polygraphy": "export",
    "accelerate": "train",
    "matplotlib": "bench",
    "jinja2": "bench",
}

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclasses.dataclass
class _Settings:
    """What holds for the whole command line."""

    verbose: bool = False


class Verb(click.Command):
    """A command whose library's log records go to stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        from nsp.terminal import logs_on_stderr

        with logs_on_stderr(verbose=ctx.obj.verbose):
            return super().invoke(ctx)


class Program(click.Group):
    """A command with verbs, which ends the process with one of the exit codes."""

    command_class = Verb

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run one command line and exit."""
        settings = _Settings()
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False, "obj": settings})
        except click.Abort:
            click.echo("interrupted: files already written are complete", err=True)
            code = INTERRUPTED
        except (click.ClickException, NspError, OSError, ModuleNotFoundError) as error:
            if settings.verbose:
                traceback.print_exc()
            message, code = explain(error)
            click.echo("error: " + one_line(" ".join(message.split())), err=True)
        sys.exit(code or DONE)


def explain(error: Exception) -> tuple[str, int]:
    """Return what a user reads about an expected error, and the exit code; raise another again."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise error
        error = MissingExtraError(package, _EXTRAS[package])
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "nsp"
        return f"{error.format_message()} (see: {path} --help)", WRONG_USAGE
    if isinstance(error, click.ClickException):
        return error.format_message(), FAILED
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        advice = "; free some space and run it again" if error.errno == errno.ENOSPC else ""
        return f"{where}{error.strerror or error}{advice}", FAILED
    return str(error), WRONG_USAGE if isinstance(error, ConfigError) else FAILED


def _be_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.obj.verbose |= value


FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**63 - 1)

verbose_option = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_be_verbose,
    help="Log details, and show the traceback of an error.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
engine_dir_option = click.option(
    "--engine-dir", type=FOLDER, help="Folder of exported engines.  [default: engines]"
)
no_verify_option = click.option(
    "--no-verify",
    is_flag=True,
    help="Take files that differ from their recorded SHA-256, such as ones edited by hand.",
)

backend_option = click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="auto (the fastest that works here), torch, onnxruntime, tensorrt or tensorrt-rtx.",
)


def seed_option(help_text: str) -> Callable[[_F], _F]:
    """Return the option --seed: what NumPy's Philox generators take."""
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
    """Return the precisions asked for; their flags are taken out of `options`."""
    return tuple(name for name in PRECISIONS if options.pop(name))


def one_precision(options: dict[str, Any]) -> str | None:
    """Return the precision asked for, if any, as `given_precisions`; ConfigError for two."""
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


def print_json(value: Any) -> None:
    """Print a JSON document on stdout."""
    click.echo(json.dumps(value, indent=1))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ConfigError when it holds something else."""
    try:
        return files.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} holds no JSON object: {error}") from error
