"""The common behaviour of all nsp commands: exit codes, one-line errors, logs, shared options.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An expected error (NspError, a file
that cannot be read or written, no memory left) is one line; a bug keeps its traceback.
"""

import contextlib
import dataclasses
import errno
import gc
import importlib
import io
import json
import os
import sys
import traceback
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nsp import files, values
from nsp.cores import MAX_THREADS
from nsp.errors import ConfigError, MissingExtraError, NspError, lacks_memory, one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

# Optional package -> the extra that installs it. Modules that cannot work without such a package
# import it at their top; the import error becomes advice here.
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

OTHER_OPTIONS = "Other options"
_GROUPS = "nsp_option_groups"  # attribute of a verb's function, until the verb is made from it

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclasses.dataclass
class _Settings:
    """State of the whole command line."""

    verbose: bool = False


class Grouped(click.Command):
    """A command whose --help shows its options under titles; see `group`."""

    def option_groups(self, ctx: click.Context) -> dict[str, list[click.Parameter]]:
        """Return the options under each title."""
        groups = vars(self.callback).get(_GROUPS, {})
        return {title: groups[title] for title in reversed(groups)}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups, then the options of none."""
        groups = self.option_groups(ctx)
        grouped = {option for options in groups.values() for option in options}
        rest = [option for option in self.get_params(ctx) if option not in grouped]
        rest = groups.pop(OTHER_OPTIONS, []) + rest
        for title, options in (*groups.items(), (OTHER_OPTIONS if groups else "Options", rest)):
            rows = [row for each in options if (row := each.get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(rows)


def group(title: str) -> Callable[[_F], _F]:
    """Return a decorator that begins a group of options in --help; the next `group` ends it."""

    def add(verb: _F) -> _F:
        groups = vars(verb).setdefault(_GROUPS, {})
        grouped = {option for options in groups.values() for option in options}
        options = [each for each in vars(verb)["__click_params__"] if each not in grouped]
        groups[title] = options[::-1]  # decorators are applied from the last to the first
        return verb

    return add


class Verb(Grouped):
    """A command whose library's log records go to stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        from nsp.console.terminal import logs_on_stderr

        with logs_on_stderr(verbose=ctx.obj.verbose):
            return super().invoke(ctx)


class OneLineErrors(click.Command):
    """A command that ends the process with one of the exit codes, and an error in one line."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run one command line and exit."""
        settings = _Settings()
        try:
            open_standard_streams()
            code = super().main(*args, **{**extra, "standalone_mode": False, "obj": settings})
            sys.stdout.flush()
        except click.Abort:
            click.echo("interrupted: files already written are complete", err=True)
            code = INTERRUPTED
        except BrokenPipeError:  # the reader closed the pipe
            drop_unwritten()
            code = FAILED
        except Exception as error:
            message, code = explain(error)
            if settings.verbose:
                traceback.print_exc()
            click.echo("error: " + one_line(" ".join(message.split())), err=True)
            drop_unwritten()
        sys.exit(code or DONE)


class Verbs(UserDict[str, click.Command]):
    """Verbs by name, each imported when it is asked for: a start needs one of ten.

    They are given as "module:name" and need no import to be listed.
    """

    def __init__(self, **places: str) -> None:
        super().__init__()
        self._places = places
        self.data = dict.fromkeys(places, click.Command(None))  # until they are imported

    def __getitem__(self, name: str) -> click.Command:
        """Return the verb."""
        if place := self._places.get(name):
            module, _, found = place.partition(":")
            with _imports_are_kept():
                self.data[name] = getattr(importlib.import_module(module), found)
            del self._places[name]
        return self.data[name]


@contextlib.contextmanager
def _imports_are_kept() -> Iterator[None]:
    """No search for garbage while modules are imported, nor ever in what they made.

    A full search over a hundred thousand functions and classes that all stay takes 12 ms.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Program(OneLineErrors, click.Group):
    """A command with verbs."""

    command_class = Verb


def open_standard_streams() -> None:
    """Raise OSError when the process was started without a standard output.

    If another standard stream is closed, it is opened on /dev/null: otherwise a picture or an
    engine could get the file number of stderr, and library messages would be written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdout is None:
        raise OSError("standard output is closed; redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths that are not UTF-8 are printed as they are
        sys.stdout.reconfigure(errors="surrogateescape")


def drop_unwritten() -> None:
    """Discard unwritten standard output: Python would try to write it again when it exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def explain(error: Exception) -> tuple[str, int]:
    """Return the user's message about an expected error, and the exit code; re-raise others."""
    if not isinstance(error, NspError | click.ClickException) and lacks_memory(error):
        said = next(iter(str(error).strip().splitlines()[-1:]), "") or type(error).__name__
        return f"not enough memory ({said}); free some, or raise the limit of this process", FAILED
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
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        advice = "; free some space and run it again" if error.errno == errno.ENOSPC else ""
        problem = str(error.strerror or error)
        if problem.startswith("is "):  # the text continues the sentence
            where = where.replace(": ", " ")
        return f"{where}{problem}{advice}", FAILED
    if isinstance(error, NspError):
        return str(error), WRONG_USAGE if isinstance(error, ConfigError) else FAILED
    raise error


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


def print_json(value: Any) -> None:
    """Print a JSON document on stdout."""
    click.echo(json.dumps(value, indent=1))


def print_tables(tables: "Iterable[RenderableType]") -> None:
    """Print rich tables on stdout."""
    from nsp.console.terminal import results_console

    console = results_console()
    for table in tables:
        console.print(table)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise ConfigError when it contains something else."""
    try:
        return files.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} does not contain a JSON object: {error}") from error
