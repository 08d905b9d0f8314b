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


def _record(text: str) -> bytes:
    """Return a record of an extended header; each begins with its own length."""
    length = len(text) + 2
    while len(f"{length} {text}\n") != length:
        length += 1
    return f"{length} {text}\n".encode()


def _block(kind: bytes, content: bytes, size: int | None = None, name: str = "h") -> bytes:
    """Return a member of any kind that may claim another size than it has."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


PAX, LONG, END = tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, bytes(1024)
ALONE = _block(PAX, _record("a=b"))
AFTER = _block(tarfile.REGTYPE, b"b", name="b.txt")


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(_block(PAX, _record("size=" + "9" * 20)), id="a size without end"),
        pytest.param(_block(PAX, _record("size=-1024")), id="a size that leads back"),
        pytest.param(_block(PAX, _record("size=" + "9" * 5000)), id="a size of too many digits"),
        pytest.param(_block(tarfile.REGTYPE, b"", 1 << 60), id="a member without end"),
        pytest.param(_block(tarfile.REGTYPE, b"", -512), id="a member that leads back"),
        pytest.param(_block(PAX, b"", 8 << 30), id="an extended header of 8 GiB"),
        pytest.param(_block(PAX, b"", -1), id="an extended header of no size"),
        pytest.param(_block(LONG, b"", 8 << 30), id="a name of 8 GiB"),
        pytest.param(_block(tarfile.XGLTYPE, b"", 2 << 20), id="a global header of 2 MiB"),
        pytest.param(_block(PAX, b"0 a=b\n"), id="a record without length"),
        pytest.param(_block(PAX, _record("a=b")) * 1200, id="headers of headers"),
        pytest.param(ALONE, id="a header of nothing"),
        pytest.param(
            _block(PAX, _record("GNU.sparse.major=1") + _record("GNU.sparse.minor=0")),
            id="a sparse member without its map",
        ),
        pytest.param(_block(PAX, _record("GNU.sparse.size=9")), id="a sparse member, of old"),
        pytest.param(_block(PAX, _record("GNU.sparse.map=0,9")), id="a sparse member, another"),
        pytest.param(_block(tarfile.GNUTYPE_SPARSE, b""), id="a sparse member of GNU tar"),
    ],
)
def test_headers_that_claim_what_cannot_be_are_an_error(headers: bytes, seekable: bool) -> None:
    """Wherever in the tar: neither taken for its end, nor read into memory, nor walked for ever."""
    last = END if headers == ALONE else AFTER + END
    for content in (headers + last, AFTER + headers + last):
        with pytest.raises(tarfile.ReadError):
            _members(content, seekable=seekable)


@pytest.mark.parametrize("seekable", [True, False])
def test_long_names_in_both_spellings_are_read(seekable: bool) -> None:
    name = "c" * 3000 + ".txt"
    pax = _block(PAX, _record(f"path={name}"))
    for content in (pax + AFTER + END, _block(LONG, name.encode() + b"\0") + AFTER + END):
        assert _members(content, seekable=seekable) == [(name, b"b")]
