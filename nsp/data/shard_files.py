"""Opens shards, as local files or by URL, with webdataset's openers.

fsspec's would need aiohttp for http, and have no counterpart of `pipe:`, which they take for the
name of a file; the three calls and the status of the fetching command would stay.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlparse
from urllib.request import url2pathname

from nsp.data.bounds import check_size
from nsp.data.tars import open_tar
from nsp.errors import ConfigError, DataError

_CUT_OFF = (23, 141, -13)  # exit codes of curl, a shell and others when we stop reading


@contextmanager
def opened(url: str) -> Iterator[tarfile.TarFile]:
    """Yield a shard open for `walk`, as webdataset opens it; raises tarfile.TarError or OSError.

    The command that fetches a URL may contain a token, so no error repeats it.
    """
    from webdataset.gopen import gopen  # type: ignore[import-untyped]

    try:
        file: IO[bytes] = gopen(url)
    except OSError:
        raise
    except Exception as error:  # every scheme has its own library
        raise OSError(f"cannot be opened: {type(error).__name__}: {error}") from error
    try:
        with open_tar(file, seekable=local_path(url) is not None) as archive:
            yield archive
    except (tarfile.TarError, OSError):
        if status := _end(file):
            raise OSError(f"the command that fetches it ended with status {status}") from None
        raise
    else:
        if status := _end(file):
            raise OSError(f"the command that fetches it ended with status {status}")
    finally:
        _end(file)


def _end(file: IO[bytes]) -> int:
    """Close a shard; return the exit status of a command that failed by itself, otherwise 0."""
    with suppress(OSError):
        file.close()
    status: int | None = getattr(file, "status", None)
    return 0 if status is None or status in _CUT_OFF else status


def extract(archive: tarfile.TarFile, info: tarfile.TarInfo, most_bytes: int) -> bytes:
    """Return the content of a member; DataError with only the reason if it is too large."""
    check_size(info.size, most_bytes)
    file = archive.extractfile(info)
    assert file is not None  # a regular file
    return file.read()


def expand(spec: str | Path) -> tuple[str, ...]:
    """Return the URLs of the shards in a folder, or of a path or URL that may contain braces."""
    if Path(spec).is_dir():
        urls = [str(path) for path in sorted(Path(spec).glob("*.tar")) if path.name[0] != "."]
        if not urls:
            raise DataError(f"{spec}: no .tar in this folder")
        return tuple(urls)
    from webdataset.shardlists import expand_urls  # type: ignore[import-untyped]

    try:
        return tuple(expand_urls(str(spec)))
    except (ValueError, AssertionError) as error:  # unbalanced braces; ${NAME} without WDS_NAME
        raise ConfigError(f"{spec}: not a path or URL of shards: {error}") from error


def check_scheme(url: str, allow_commands: bool) -> None:
    """Raise ConfigError for a URL that cannot be read or is not allowed."""
    from webdataset.gopen import gopen_schemes

    scheme = urlparse(url).scheme
    if scheme == "pipe" and not allow_commands:
        raise ConfigError(
            f"{url} would run a shell command; mount its source as a folder, or use an https: URL"
        )
    if scheme and scheme != "file" and scheme not in gopen_schemes:
        known = ", ".join(sorted({*gopen_schemes, "file"} - {"__default__", "pipe"}))
        raise ConfigError(f"{url}: {scheme}: cannot be read; choose a path or one of {known}")


def local_path(url: str) -> Path | None:
    """Return the path of a URL on this machine, None for other URLs."""
    parts = urlparse(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme else Path(url)


def line_of(error: Exception) -> str:
    """Return the text of a library's error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
