import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image, features

from nsp.data import emoji as builder
from nsp.data.heldout import HELDOUT_MEMBER
from nsp.data.sources import EMOJI_TAR, ImageSource, open_source
from nsp.errors import DataError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
APPLE, FIREFIGHTER = "\U0001f34e", "\U0001f469\U0001f3fe\u200d\U0001f692"


@pytest.fixture(scope="module")
def embedded() -> ImageSource:
    return open_source("emoji", split="all")


@pytest.fixture
def font_path() -> Path:
    pytest.importorskip("emoji", reason="needs the extra [emoji]")
    if not FONT.is_file():
        pytest.skip("needs the Debian package fonts-noto-color-emoji")
    if not features.check("raqm"):
        pytest.skip("needs Pillow with RAQM")
    return FONT


@pytest.fixture
def two_emoji(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Shrink the builder to an apple and a held-out firefighter; return the held-out list."""
    kept = [entry for entry in builder.list_emoji() if entry.text in (APPLE, FIREFIGHTER)]
    monkeypatch.setattr(builder, "list_emoji", lambda: kept)
    heldout = tmp_path / "heldout.tsv"
    row = "1f469-1f3fe-200d-1f692\twoman firefighter medium-dark skin tone\n"
    heldout.write_text("codepoints\tcaption\n" + row, encoding="utf-8")
    return heldout


def test_the_embedded_set_is_a_plain_deterministic_tar() -> None:
    with tarfile.open(EMOJI_TAR, "r:") as archive:
        members = archive.getmembers()
        heldout = archive.extractfile(HELDOUT_MEMBER)
        assert heldout is not None
        assert heldout.read() == builder.HELDOUT_FILE.read_bytes()
    names = [member.name for member in members]
    assert len(names) == len(set(names)) == 2 * 3789 + 1
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert sorted(names[1:], key=lambda name: name.split(".")) == names[1:]


def test_every_embedded_picture_is_rgb_at_64_px_and_every_caption_once(
    embedded: ImageSource,
) -> None:
    assert {embedded.load(index).size for index in range(0, len(embedded), 7)} == {(64, 64)}
    captions = [sample.caption for sample in embedded.samples]
    assert len(set(captions)) == 3789
    assert not [caption for caption in captions if ":" in caption or "_" in caption]


def test_two_builds_give_the_same_bytes(font_path: Path, two_emoji: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    assert builder.build(font_path, first, heldout_path=two_emoji) == 2
    builder.build(font_path, second, heldout_path=two_emoji)
    assert first.read_bytes() == second.read_bytes()
    assert [sample.caption for sample in open_source(first).samples] == ["red apple"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first.tar",
        "heldout.tsv",
        "second.tar",
    ]


def test_a_rendered_picture_matches_the_embedded_one(
    font_path: Path, embedded: ImageSource
) -> None:
    index = [sample.caption for sample in embedded.samples].index("red apple")
    picture = builder.render(builder.load_font(font_path), APPLE)
    assert picture.tobytes() == embedded.load(index).tobytes()
    encoded = builder.encode_webp(picture)
    assert Image.open(io.BytesIO(encoded)).convert("RGB").tobytes() == picture.tobytes()


def test_sequences_the_font_does_not_join_are_left_out(font_path: Path) -> None:
    font = builder.load_font(font_path)
    assert builder.renders_as_one_glyph(font, FIREFIGHTER)
    assert not builder.renders_as_one_glyph(font, APPLE + APPLE)
    assert not builder.renders_as_one_glyph(font, "\U0010ffff")


def test_a_heldout_emoji_that_is_not_built_stops_the_build(
    font_path: Path, two_emoji: Path, tmp_path: Path
) -> None:
    two_emoji.write_text("codepoints\tcaption\n1f34e\tgreen apple\n", encoding="utf-8")
    with pytest.raises(DataError, match="green apple"):
        builder.build(font_path, tmp_path / "out.tar", heldout_path=two_emoji)
    assert not (tmp_path / "out.tar").exists()
