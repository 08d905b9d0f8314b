"""The common behaviour of all nsp commands: exit codes, one-line errors, logs, groups of options.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An expected error (NspError, a file
that cannot be read or written, no memory left) is one line; a bug keeps its traceback.
"""

import contextlib
import dataclasses
import errno
import gc
import importlib
import io
import os
import sys
import traceback
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from nsp.errors import ConfigError, MissingExtraError, NspError, lacks_memory, one_line

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
