"""Whatever lies in a folder, it is read or refused in one line, within bounds of memory."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsp.data.pack import pack
from nsp.data.sources import survey
from nsp.data.stats import collect, write_stats
from nsp.errors import NspError
from tests.data.hostile_folders import make_hostile_folder

_MOST_BYTES = 3 << 30  # beyond what the process has, of address space


@pytest.fixture
def bounded() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def look(root: Path, output: Path) -> str | None:
    """Survey, count and pack a folder; return the error that a user reads, if any."""
    try:
        found = survey(root)
        write_stats(collect(found), found, output / "stats")
        json.dumps(found.choose("all").identity()).encode()
        pack(root, output / "shards", skip_bad_files=True)
    except NspError as error:
        return str(error)
    return None


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_a_hostile_folder_is_read_or_refused_in_one_line(tmp_path: Path, first: int) -> None:
    messages = []
    for seed in range(first, first + 20):
        root = make_hostile_folder(tmp_path / f"{seed}", seed)
        message = look(root, tmp_path / f"out{seed}")
        if message is not None:
            messages.append(message)
    assert [each for each in messages if "\n" in each or len(each) > 3000] == []
    "".join(messages).encode()
    assert 0 < len(messages) < 20  # neither all is refused, nor is nothing
