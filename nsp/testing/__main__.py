"""`python -m nsp.testing FAMILY`: every check of an installed family, one line each."""

import sys
import tempfile
from pathlib import Path

import click

from nsp.errors import NspError
from nsp.family.registry import family
from nsp.testing import CHECKS, UnderTest


@click.command()
@click.argument("name", metavar="FAMILY")
@click.option("--recipe", help='Training run to try; default: the one named after "smoke".')
def main(name: str, recipe: str | None) -> None:
    """Check that an installed family keeps what nsp promises of families."""
    try:
        found = family(name)
    except NspError as error:
        raise click.ClickException(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="nsp-testing-") as folder:
        made, failed = UnderTest(found, Path(folder) / name, recipe=recipe), 0
        for check in CHECKS:
            words = check.__name__.replace("_", " ")
            try:
                check(made)
            except Exception as error:  # a broken family may raise anything
                failed += 1
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                click.echo(f"FAILED  {words}: {kind}{error}")
            else:
                click.echo(f"passed  {words}")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
