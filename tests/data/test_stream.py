import itertools
import logging
import random
import shutil
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from nsp.data.dataset import batches
from nsp.data.pack import pack
from nsp.data.shards import ShardReader, find_shards
from nsp.data.stream import ShardStream, StreamItem
from nsp.errors import ConfigError, DataError
from tests.data.picture_files import encoded, write_files, write_tar

PNG = encoded(".png", size=(8, 8))


def _samples(*keys: str) -> dict[str, bytes | str]:
    """Return the members of samples captioned by their keys, each picture another."""
    files: dict[str, bytes | str] = {}
    for key in keys:
        files |= {f"{key}.png": encoded(".png", hash_of(key), (10, 9)), f"{key}.txt": f"of {key}"}
    return files


def hash_of(key: str) -> int:
    return int.from_bytes(key.encode(), "big")


def _shards(folder: Path, *lengths: int) -> str:
    """Write shards of these lengths and return the pattern that names them."""
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(lengths):
        keys = [f"{number}-{sample}" for sample in range(length)]
        write_tar(folder / f"{number:02}.tar", _samples(*keys))
    return f"{folder}/{{00..{len(lengths) - 1:02}}}.tar"


def _stream(spec: Any, **options: Any) -> ShardStream:
    return ShardStream(spec, 8, **{"batch_size": 3, "train": True, "crop": True} | options)


def _items(stream: ShardStream, count: int | None = None) -> list[StreamItem]:
    return list(itertools.islice(stream, count))


def _keys(stream: ShardStream, count: int | None = None) -> list[str]:
    return [item["key"] for item in _items(stream, count)]


def _steps(stream: ShardStream, count: int, *, num_workers: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(stream.loader(num_workers=num_workers), count))


def _assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert (one["caption"], one["class_id"].tolist()) == (
            other["caption"],
            other["class_id"].tolist(),
        )


# Items


def test_items_have_the_promised_fields(tmp_path: Path) -> None:
    files = _samples("a", "d/b") | {"a.cls": "4", "d/c.json": "{}"}
    write_tar(tmp_path / "0.tar", dict(sorted(files.items())))
    first, second = _items(_stream(tmp_path, train=False))
    assert first["image"].shape == (3, 8, 8)
    assert first["image"].dtype == torch.uint8
    assert (first["caption"], first["class_id"], first["key"]) == ("of a", 4, "a")
    assert (second["caption"], second["class_id"], second["key"]) == ("of d/b", -1, "d/b")


def test_without_training_every_sample_comes_once_and_in_order(tmp_path: Path) -> None:
    spec = _shards(tmp_path, 4, 1, 5)
    expected = [f"{shard}-{number}" for shard, n in enumerate((4, 1, 5)) for number in range(n)]
    assert _keys(_stream(spec, train=False)) == expected
    for num_workers in (0, 2):
        found = list(_stream(spec, train=False, start_step=1).loader(num_workers=num_workers))
        assert [key for batch in found for key in batch["key"]] == expected[3:]


# Order


def test_an_epoch_holds_every_sample_once_and_no_two_are_alike(tmp_path: Path) -> None:
    spec = _shards(tmp_path, 7, 3, 9, 4)
    keys = _keys(_stream(spec, num_lanes=1, shuffle_buffer=5), 23 * 3)
    epochs = [keys[:23], keys[23:46], keys[46:]]
    assert [len(set(epoch)) for epoch in epochs] == [23, 23, 23]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert keys != _keys(_stream(spec, num_lanes=1, shuffle_buffer=5, seed=1), 23 * 3)
    unshuffled = _keys(_stream(spec, num_lanes=1, shuffle_buffer=1), 23)
    assert sorted(unshuffled) == sorted(epochs[0])
    assert {tuple(group) for _, group in itertools.groupby(key[0] for key in unshuffled)} == {
        ("0",) * 7,
        ("1",) * 3,
        ("2",) * 9,
        ("3",) * 4,
    }


@pytest.mark.parametrize(
    ("num_shards", "world_size", "num_lanes"), [(6, 2, 1), (5, 2, 2), (7, 3, 2), (3, 3, 1)]
)
def test_ranks_cover_every_sample_equally(
    tmp_path: Path, num_shards: int, world_size: int, num_lanes: int
) -> None:
    spec = _shards(tmp_path, *[4] * num_shards)
    epochs = world_size * num_lanes  # after which every lane has had as many shards
    seen: Counter[str] = Counter()
    first_epoch: list[set[str]] = []
    for rank in range(world_size):
        options: dict[str, Any] = {"rank": rank, "world_size": world_size, "batch_size": 4}
        stream = _stream(spec, num_lanes=num_lanes, **options)
        keys = _keys(stream, 4 * num_shards * epochs // world_size)
        seen.update(keys)
        first_epoch.append(set(keys[: 4 * (num_shards // epochs) * num_lanes]))
    assert set(seen.values()) == {epochs}
    assert len(seen) == 4 * num_shards
    assert sum(map(len, first_epoch)) == len(set().union(*first_epoch))  # no two ranks meet


def test_too_few_shards_are_refused_with_the_numbers(tmp_path: Path) -> None:
    spec = _shards(tmp_path, 1, 1, 1)
    with pytest.raises(ConfigError, match=r"3 shards for 4 ranks of 1 lanes.*samples-per-shard"):
        _stream(spec, world_size=4)
    with pytest.raises(ConfigError, match="3 shards for 2 ranks of 2 lanes"):
        _stream(spec, world_size=2, num_lanes=2)
    assert _stream(spec).num_lanes == 2
    assert _stream(spec, world_size=2).num_lanes == 1
    for wrong in ({"rank": 1}, {"batch_size": 0}, {"start_step": -1}, {"shuffle_buffer": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            _stream(spec, **wrong)


# Resume


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # on two cores
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_a_resumed_stream_gives_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, num_workers: int, num_lanes: int
) -> None:
    spec = _shards(tmp_path, 7, 3, 9, 4, 6)
    options = {"num_lanes": num_lanes, "flip": True, "shuffle_buffer": 5}
    expected = _steps(_stream(spec, **options), 34)  # three epochs and a half
    generator = random.Random(num_workers)
    for start in (0, *(generator.randrange(1, 30) for _ in range(2 if num_workers else 12))):
        resumed = _stream(spec, start_step=start, **options)
        _assert_same(_steps(resumed, 4, num_workers=num_workers), expected[start : start + 4])


@pytest.mark.parametrize("skip_bad_files", [False, True])
def test_a_packed_set_resumes_without_opening_what_it_passes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_bad_files: bool
) -> None:
    _shards(tmp_path / "set", 30)
    pack(tmp_path / "set", tmp_path / "packed", samples_per_shard=5)
    options = {"num_lanes": 1, "shuffle_buffer": 4, "skip_bad_files": skip_bad_files}
    expected = _steps(_stream(tmp_path / "packed", **options), 29)
    opened = []
    read = ShardReader.read

    def counting(self: ShardReader, url: str, *, skip: int = 0) -> Any:
        opened.append(url)
        return read(self, url, skip=skip)

    monkeypatch.setattr(ShardReader, "read", counting)
    resumed = _stream(tmp_path / "packed", start_step=28, **options)  # 24 of the third epoch
    _assert_same(_steps(resumed, 1), expected[28:])
    assert len(opened) <= (8 if skip_bad_files else 2)


def test_passing_over_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _shards(tmp_path, 9, 9)
    expected = _keys(_stream(spec), 3 * 8)[21:]
    decoded = []
    decode = __import__("nsp.data.stream", fromlist=["decode_rgb"]).decode_rgb
    monkeypatch.setattr(
        "nsp.data.stream.decode_rgb", lambda content: decoded.append(1) or decode(content)
    )
    assert _keys(_stream(spec, start_step=7), 3) == expected
    assert len(decoded) == 3


# Held-out samples

LIST = "name\tcaption\nb\tred apple\n"


def _apples() -> dict[str, bytes | str]:
    """Return b, held out by name; c, by caption; d, by caption in another spelling; and others."""
    files = _samples("a", "b", "c", "d", "e")
    return files | {"b.txt": "green apple", "c.txt": "red apple", "d.txt": "Red  APPLE"}


def _never_held_out(stream: ShardStream) -> None:
    items = _items(stream, 40)
    assert {item["key"] for item in items} == {"a", "e"}
    assert not [item for item in items if "apple" in item["caption"].casefold()]


def test_heldout_samples_of_any_shard_are_never_seen(tmp_path: Path) -> None:
    files = _apples()
    for number, key in enumerate("abcde"):
        sample = {name: files[name] for name in (f"{key}.png", f"{key}.txt")}
        if key == "e":  # after its samples, in the last shard
            sample["__heldout__"] = LIST
        write_tar(tmp_path / f"{number}.tar", sample)
    for num_lanes in (1, 2):
        _never_held_out(_stream(tmp_path, num_lanes=num_lanes))
    assert set(_keys(_stream(tmp_path, train=False))) == {"a", "e"}


def test_a_list_beside_the_shards_holds_out_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", _apples())
    write_files(tmp_path, {"__heldout__": LIST})
    _never_held_out(_stream(tmp_path))
    _never_held_out(_stream(str(tmp_path / "0.tar"), start_step=5))


def test_packing_keeps_the_list(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", _apples() | {"__heldout__": LIST})
    index = pack(tmp_path / "0.tar", tmp_path / "packed", samples_per_shard=1)
    assert (index.num_samples, index.num_heldout) == (5, 3)
    _never_held_out(_stream(tmp_path / "packed"))
    pipes = f"pipe:cat {tmp_path}/packed/train-{{000000..000004}}.tar"
    _never_held_out(_stream(find_shards(pipes, allow_commands=True)))


def test_a_list_that_comes_too_late_to_be_heeded_stops_the_stream(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", _samples("x") | {"__heldout__": LIST})
    pipe = find_shards(f"pipe:cat {tmp_path}/0.tar", allow_commands=True)
    for skip_bad_files in (False, True):
        with pytest.raises(DataError, match=r"lists 1 held-out samples .* first in every shard"):
            _keys(_stream(pipe, skip_bad_files=skip_bad_files), 9)


# Bad files


def _damaged(folder: Path) -> Path:
    """Write three shards: one cut in its third sample, one with four bad samples of seven."""
    _shards(folder, 4, 6)
    cut = folder / "00.tar"
    cut.write_bytes(cut.read_bytes()[: 4 * 512 * 2 + 700])
    files = _samples("n0", "n1", "n2") | {"wordless.png": PNG, "blank.txt": " ", "blank.png": PNG}
    files |= {"alone.txt": "x", "broken.png": PNG[:50], "broken.txt": "of broken"}
    write_tar(folder / "02.tar", dict(sorted(files.items())))
    return folder


BAD = ["00.tar (", "alone (a caption needs", "blank (its caption is empty", "broken (", "wordless"]


def test_what_is_bad_is_an_error_that_names_it(tmp_path: Path) -> None:
    _damaged(tmp_path)
    for shard, names in (("00.tar", BAD[:1]), ("02.tar", BAD[1:])):
        with pytest.raises(DataError, match="--skip-bad-files") as caught:
            _keys(_stream(str(tmp_path / shard)), 30)
        assert any(name in str(caught.value) for name in names)
        assert "\n" not in str(caught.value)


def test_an_error_in_a_worker_is_one_line(tmp_path: Path) -> None:
    _damaged(tmp_path)
    loader = _stream(str(tmp_path / "00.tar")).loader(num_workers=1)
    with pytest.raises(DataError) as caught:
        list(batches(loader))
    assert str(caught.value).startswith(str(tmp_path / "00.tar"))
    assert "\n" not in str(caught.value)


def test_left_out_files_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = _stream(_damaged(tmp_path), train=False, skip_bad_files=True)
    with caplog.at_level(logging.WARNING):
        keys = _keys(stream)
    assert keys == ["0-0", "0-1", *(f"1-{number}" for number in range(6)), "n0", "n1", "n2"]
    assert stream.num_left_out == 5
    assert [name for name in BAD if name not in caplog.text] == []
    counted = _stream(tmp_path, train=False, skip_bad_files=True)
    list(counted.loader(num_workers=1))
    assert counted.num_left_out == 5  # in a worker too


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_beside_bad_files(tmp_path: Path, num_workers: int) -> None:
    options = {"skip_bad_files": True, "shuffle_buffer": 4, "num_lanes": 1}
    expected = _steps(_stream(_damaged(tmp_path), **options), 20)
    assert not any("broken" in key for batch in expected for key in batch["key"])
    for start in (5, 11):
        found = _steps(_stream(tmp_path, start_step=start, **options), 5, num_workers=num_workers)
        _assert_same(found, expected[start : start + 5])


def test_a_set_without_a_usable_sample_ends_in_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.txt": "a"})
    with pytest.raises(DataError, match="no usable training sample"):
        _keys(_stream(tmp_path, skip_bad_files=True), 1)
    write_tar(tmp_path / "0.tar", {"a.png": b"x", "a.txt": "a"})
    with pytest.raises(DataError, match="no picture of the batch"):
        _keys(_stream(tmp_path, skip_bad_files=True), 1)


def test_packed_shards_that_changed_are_named_before_the_first_step(tmp_path: Path) -> None:
    _shards(tmp_path / "set", 6)
    pack(tmp_path / "set", tmp_path / "packed", samples_per_shard=3)
    shard = tmp_path / "packed" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])  # in the third sample
    with pytest.raises(DataError, match=r"train-000001\.tar \(5000 bytes, but index.json says"):
        _stream(tmp_path / "packed")
    keys = _keys(_stream(tmp_path / "packed", train=False, skip_bad_files=True))
    assert len(keys) == 5


def test_an_index_of_other_shards_stops_the_stream(tmp_path: Path) -> None:
    _shards(tmp_path / "set", 6)
    pack(tmp_path / "set", tmp_path / "packed", samples_per_shard=3)
    path = tmp_path / "packed" / "index.json"
    path.write_text(path.read_text().replace('"num_train": 3', '"num_train": 2'))
    with pytest.raises(DataError, match="3 training samples, expected 2"):
        _keys(_stream(tmp_path / "packed"), 12)


# Where shards lie


def test_shards_come_over_http(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("webdataset fetches with curl")
    _shards(tmp_path / "set", 8)
    pack(tmp_path / "set", tmp_path / "packed", samples_per_shard=2)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "packed"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/train-{{000000..000003}}.tar"
        expected = _steps(_stream(tmp_path / "packed"), 8)
        _assert_same(_steps(_stream(url, start_step=6), 2), expected[6:])
        assert len(find_shards(url).records) == 4
        (tmp_path / "packed" / "train-000002.tar").unlink()
        with pytest.raises(DataError, match=r"train-000002.tar \(.*status 22"):
            _keys(_stream(url), 24)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{folder}/{{00..01}}.tar", DataError, r"1 shards do not exist, first .*01\.tar"),
        ("{folder}/empty", DataError, "no .tar in this folder"),
        ("pipe:cat {folder}/00.tar", ConfigError, "would run a shell command"),
        ("s3://bucket/00.tar", ConfigError, "s3: cannot be read; choose a path or one of"),
        ("{folder}/${{NOWHERE}}.tar", ConfigError, "not a path or URL of shards"),
    ],
)
def test_a_spec_that_cannot_be_read_is_refused_at_once(
    tmp_path: Path, spec: str, error: type[Exception], message: str
) -> None:
    _shards(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        _stream(spec.format(folder=tmp_path))
