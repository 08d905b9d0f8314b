import io
import tarfile

import pytest

from nsp.data.tars import open_tar, walk
from tests.data.picture_files import write_tar


def _members(content: bytes, *, seekable: bool) -> list[tuple[str, bytes]]:
    with open_tar(io.BytesIO(content), seekable=seekable) as archive:
        found = []
        for member in walk(archive):
            file = archive.extractfile(member)
            assert file is not None
            found.append((member.name, file.read()))
        return found


@pytest.fixture
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    return write_tar(path, {"a.txt": b"a" * 700, "b.txt": b"b", "c.txt": b""}).read_bytes()


@pytest.mark.parametrize("seekable", [True, False])
def test_a_whole_tar_is_walked_to_its_end(content: bytes, seekable: bool) -> None:
    expected = [("a.txt", b"a" * 700), ("b.txt", b"b"), ("c.txt", b"")]
    assert _members(content, seekable=seekable) == expected


@pytest.mark.parametrize("seekable", [True, False])
def test_a_tar_cut_anywhere_is_an_error(content: bytes, seekable: bool) -> None:
    end = 512 + 1024 + 512 + 512 + 512  # of the last member; then the end mark
    for length in range(0, end + 511, 100):
        with pytest.raises(tarfile.ReadError):
            _members(content[:length], seekable=seekable)


@pytest.mark.parametrize("seekable", [True, False])
def test_a_damaged_header_is_not_taken_for_the_end(content: bytes, seekable: bool) -> None:
    damaged = content[:1536] + b"x" * 512 + content[2048:]
    with pytest.raises(tarfile.ReadError, match="damaged"):
        _members(damaged, seekable=seekable)
