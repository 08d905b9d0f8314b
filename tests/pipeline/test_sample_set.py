"""A set has the exact number of pictures, whoever makes them, in one go or after stops."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nsp.data.picture_archive import open_pictures, write_pictures
from nsp.errors import ConfigError, DataError
from nsp.pipeline import sample_set
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from nsp.pipeline.results import to_uint8
from nsp.pipeline.sample_set import SampleSet, Shard, make_samples


@pytest.fixture(scope="module")
def pipeline(tiny_class_checkpoint: Path) -> Pipeline:
    return load_pipeline(tiny_class_checkpoint, device="cpu")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_set, "PART_SIZE", 3)


def wanted(pipeline: Pipeline, folder: Path, num_images: int = 7, **options) -> SampleSet:
    return SampleSet(pipeline=pipeline, folder=folder, num_images=num_images, **options)


def pictures(path: Path | None) -> NDArray[np.uint8]:
    assert path is not None
    with np.load(path) as archive:
        assert list(archive) == ["arr_0"]
        return archive["arr_0"]


def same(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two sets are equal but for the rounding of other batch sizes."""
    return one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 1


@pytest.fixture(scope="module")
def whole(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """Seven pictures of one process, made without parts."""
    orders = [wanted(pipeline, tmp_path_factory.mktemp("none")).order(i) for i in range(7)]
    return np.concatenate([to_uint8(pipeline.images([order])) for order in orders])


def test_one_process_makes_the_exact_number_and_removes_the_parts(
    pipeline: Pipeline, tmp_path: Path, whole: NDArray[np.uint8]
) -> None:
    made = wanted(pipeline, tmp_path)
    seen: list[tuple[str, int, int]] = []
    path = make_samples(made, batch_size=2, on_progress=lambda *each: seen.append(each))
    assert same(pictures(path), whole)
    assert [done for _, done, _ in seen] == [2, 3, 5, 6, 7]
    assert {total for *_, total in seen} == {7}
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        f"{made.name}.json",
        f"{made.name}.npz",
    ]
    described = json.loads((tmp_path / f"{made.name}.json").read_text())
    assert described == {**made.settings(), "num_images": 7}


def test_a_shard_beside_those_of_other_engines_says_so(
    pipeline: Pipeline,
    tiny_class_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = tmp_path / "engines"
    link.symlink_to(tiny_class_checkpoint)
    other, out = load_pipeline(link, device="cpu"), tmp_path / "samples"
    other.precision = "fp16"
    for number in range(2):  # the same set goes on without a word
        assert make_samples(wanted(pipeline, out), shard=Shard(number, 3)) is None
    assert not caplog.records
    assert make_samples(wanted(other, out), shard=Shard(2, 3)) is None
    (record,) = caplog.records
    said = record.getMessage()
    assert f"{wanted(pipeline, out).name}.parts has parts of the same pictures" in said
    assert "made by torch fp32" in said
    assert f"another set, {wanted(other, out).name}, by torch fp16" in said
    caplog.clear()
    make_samples(wanted(other, out, seed=1), shard=Shard(0, 3))  # other pictures
    assert not caplog.records


def test_what_a_killed_packing_left_is_removed(pipeline: Pipeline, tmp_path: Path) -> None:
    made = wanted(pipeline, tmp_path)
    (tmp_path / f".{made.name}.npz.0123abcd.partial").write_bytes(b"half")
    (tmp_path / f"{made.name}.json").write_text("half")
    made.part(0).parent.mkdir()
    (made.part(0).parent / ".00000.npz.0123abcd.partial").write_bytes(b"half")
    make_samples(made)
    assert sorted(each.suffix for each in tmp_path.iterdir()) == [".json", ".npz"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_shards_in_any_order_make_the_same_set_and_the_last_one_packs_it(
    pipeline: Pipeline, tmp_path: Path, whole: NDArray[np.uint8], order: tuple[int, ...]
) -> None:
    made = wanted(pipeline, tmp_path)
    paths = [make_samples(made, shard=Shard(index, 3), batch_size=4) for index in order]
    assert paths[:2] == [None, None]
    assert same(pictures(paths[2]), whole)


def test_more_processes_than_parts_have_nothing_to_do(pipeline: Pipeline, tmp_path: Path) -> None:
    made = wanted(pipeline, tmp_path, 2)
    assert make_samples(made, shard=Shard(5, 8)) is None
    assert pictures(make_samples(made, shard=Shard(0, 8))).shape[0] == 2
    assert make_samples(made, shard=Shard(5, 8)) == made.archive


def test_a_finished_part_is_not_made_again_and_a_damaged_one_is(
    pipeline: Pipeline, tmp_path: Path, whole: NDArray[np.uint8]
) -> None:
    made = wanted(pipeline, tmp_path)
    make_samples(made, shard=Shard(0, 2))
    first, last = made.part(0), made.part(2)
    last.write_bytes(last.read_bytes()[:-30])
    before = first.stat().st_mtime_ns
    seen: list[tuple[str, int, int]] = []
    make_samples(made, shard=Shard(0, 2), on_progress=lambda *each: seen.append(each))
    assert first.stat().st_mtime_ns == before
    assert [done for _, done, _ in seen] == [1]
    assert same(pictures(make_samples(made, shard=Shard(1, 2))), whole)
    again = wanted(pipeline, tmp_path)
    seen.clear()
    assert make_samples(again, on_progress=lambda *each: seen.append(each)) == made.archive
    assert seen == []


def test_a_larger_number_uses_the_parts_that_are_there(
    pipeline: Pipeline, tmp_path: Path, whole: NDArray[np.uint8]
) -> None:
    make_samples(wanted(pipeline, tmp_path, 4), shard=Shard(0, 2))  # pictures 0 to 2
    more = wanted(pipeline, tmp_path, 7)
    before = more.part(0).stat().st_mtime_ns
    make_samples(more, shard=Shard(0, 2))
    assert more.part(0).stat().st_mtime_ns == before
    fewer = make_samples(wanted(pipeline, tmp_path, 2))
    assert same(pictures(fewer), whole[:2])


@pytest.mark.parametrize("changed", ["labels", "sampling"])
def test_parts_and_archives_of_other_settings_are_refused_by_name(
    pipeline: Pipeline, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "labels": {"labels": np.arange(7)},
        "sampling": {"sampling": pipeline.sampling.changed({"top_k": 3})},
    }[changed]
    monkeypatch.setattr(type(pipeline.family), "sample_name", lambda *_, **__: "set")
    make_samples(wanted(pipeline, tmp_path), shard=Shard(0, 2))
    other = wanted(pipeline, tmp_path, **options)
    with pytest.raises(ConfigError, match=rf"00000.npz was made with other settings .{changed} "):
        make_samples(other)
    make_samples(wanted(pipeline, tmp_path))
    with pytest.raises(ConfigError, match=rf"set.npz was made with other settings .{changed} "):
        make_samples(other)
    with pytest.raises(ConfigError, match=r"set.npz was made with other settings .num_images 7"):
        make_samples(wanted(pipeline, tmp_path, 8))


def test_an_archive_that_nothing_describes_is_not_replaced(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    made = wanted(pipeline, tmp_path)
    made.archive.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"\.npz was made with other settings"):
        make_samples(made)
    assert made.archive.read_bytes() == b"mine"


def test_a_part_with_a_changed_pixel_stops_the_packing_by_name(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    made = wanted(pipeline, tmp_path)
    make_samples(made, shard=Shard(0, 2))
    content = bytearray(made.part(0).read_bytes())
    content[400] ^= 1
    made.part(0).write_bytes(content)
    with pytest.raises(DataError, match=r"00000.npz is damaged .* or remove it and run"):
        make_samples(made, shard=Shard(1, 2))
    assert not made.archive.exists()
    made.part(0).unlink()
    assert make_samples(made) == made.archive


def test_labels_are_uniform_over_the_classes_and_follow_the_seed_and_the_index(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    made = wanted(pipeline, tmp_path, 50_000)
    labels = [made.order(index).condition for index in range(4000)]
    assert labels[:50] == [wanted(pipeline, tmp_path, 50).order(i).condition for i in range(50)]
    counts = Counter(labels)
    assert set(counts) == set(range(10))
    # Uniformly at random: about 400 each with a deviation of 19, and not exactly 400 each.
    assert all(300 < count < 500 for count in counts.values())
    assert len(set(counts.values())) > 3
    other = wanted(pipeline, tmp_path, 50_000, seed=1)
    assert labels != [other.order(index).condition for index in range(4000)]
    seeds = {each.order(index).seed for each in (made, other) for index in range(4000)}
    assert len(seeds) == 8000


def test_given_labels_are_used_and_checked(pipeline: Pipeline, tmp_path: Path) -> None:
    labels = np.array([9, 0, 3])
    made = wanted(pipeline, tmp_path, 3, labels=labels)
    assert [made.order(index).condition for index in range(3)] == [9, 0, 3]
    with pytest.raises(ConfigError, match="3 labels are given for 7 pictures"):
        wanted(pipeline, tmp_path, labels=labels)
    with pytest.raises(ConfigError, match=r"label 1 is 10; classes of this model are 0..9"):
        wanted(pipeline, tmp_path, 3, labels=np.array([0, 10, 1]))


def test_a_picture_of_the_set_can_be_made_again_alone(
    pipeline: Pipeline, tmp_path: Path, whole: NDArray[np.uint8]
) -> None:
    order = wanted(pipeline, tmp_path).order(5)
    made = pipeline.generate(class_ids=[order.condition], seed=order.seed)
    assert np.array_equal(made.images[0], whole[5])


def test_pictures_may_have_another_size(pipeline: Pipeline, tmp_path: Path) -> None:
    made = wanted(pipeline, tmp_path, 2, size_px=24)
    assert "-size-64-size-24-" in made.name
    orders = [made.order(0), made.order(1)]
    expected = to_uint8(pipeline.images(orders), size_px=24)
    assert same(pictures(make_samples(made)), expected)


def test_pictures_are_resized_before_they_are_clipped(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that does not clip: published programs resize what it made as it is."""
    stages = pipeline.backend._stages
    decoder = stages["decoder"]

    def overshooting(latent: torch.Tensor) -> tuple[torch.Tensor]:
        return (3 * decoder(latent)[0] - 1,)

    monkeypatch.setitem(stages, "decoder", overshooting)
    made = wanted(pipeline, tmp_path, 2, size_px=24)
    orders = [made.order(0), made.order(1)]
    raw, clipped = pipeline.images(orders, clipped=False), pipeline.images(orders)
    assert raw.min() < 0
    assert raw.max() > 1
    assert np.array_equal(clipped, raw.clip(0, 1))
    found = pictures(make_samples(made))
    assert same(found, to_uint8(raw, size_px=24))
    assert not same(found, to_uint8(clipped, size_px=24))


def test_the_name_has_the_settings_that_are_not_the_usual_ones(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    sampling = pipeline.sampling.changed({"top_k": 900, "guidance_scale": 1.5})
    made = wanted(pipeline, tmp_path, sampling=sampling, seed=4)
    assert made.name.startswith("var-checkpoint-size-64-size-64-")
    assert "top_k-900" in made.name
    assert made.name.endswith("-seed-4")


def test_a_family_may_compose_the_name_of_its_first_implementation(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(family, config, sampling, *, model, size_px, size_eval_px, seed) -> str:
        return (
            f"GPT-B-{model}-size-{size_px}-size-{size_eval_px}-VQ-16-topk-{sampling.top_k}-"
            f"topp-{sampling.top_p}-temperature-{sampling.temperature}-cfg-2.0-seed-{seed}"
        )

    monkeypatch.setattr(type(pipeline.family), "sample_name", name)
    settings = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    made = wanted(pipeline, tmp_path, sampling=pipeline.sampling.changed(settings), size_px=24)
    assert made.archive == tmp_path / (
        "GPT-B-checkpoint-size-64-size-24-VQ-16-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0.npz"
    )


def test_a_model_of_prompts_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this model takes prompts; use --prompts-file"):
        wanted(load_pipeline(tiny_checkpoint, device="cpu"), tmp_path)


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(index: int, count: int) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Shard(index, count)


def test_while_one_process_packs_another_waits_and_finds_the_archive(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = wanted(pipeline, tmp_path)
    make_samples(made, shard=Shard(0, 2))
    written: list[Path] = []

    def slowly(path: Path, *arguments, **options) -> None:
        if path == made.archive:
            time.sleep(0.5)
            written.append(path)
        write_pictures(path, *arguments, **options)

    monkeypatch.setattr(sample_set, "write_pictures", slowly)
    found: list[Path | None] = []
    both = [
        threading.Thread(target=lambda: found.append(make_samples(made, shard=Shard(1, 2))))
        for _ in range(2)
    ]
    both[0].start()
    time.sleep(0.2)
    both[1].start()
    for each in both:
        each.join()
    assert found == [made.archive] * 2
    assert len(written) == 1
    assert open_pictures(made.archive).shape[0] == 7


def _run_slowly(checkpoint: Path, folder: Path, shard: Shard, pause: float) -> None:
    """Make a shard in another process, with a pause after every batch."""
    sample_set.PART_SIZE = 3
    pipeline = load_pipeline(checkpoint, device="cpu")
    make_samples(
        wanted(pipeline, folder, 12),
        shard=shard,
        batch_size=1,
        on_progress=lambda *_: time.sleep(pause),
    )


def test_a_killed_process_loses_only_its_part_and_two_at_once_make_each_part_once(
    pipeline: Pipeline, tiny_class_checkpoint: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    made = wanted(pipeline, tmp_path, 12)

    def process(shard: Shard, pause: float) -> multiprocessing.context.SpawnProcess:
        arguments = (tiny_class_checkpoint, tmp_path, shard, pause)
        started = context.Process(target=_run_slowly, args=arguments)
        started.start()
        return started

    first = process(Shard(0, 2), 0.3)
    deadline = time.monotonic() + 60
    while not made.part(0).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert made.part(0).exists()
    assert not made.part(2).exists()
    before = made.part(0).stat().st_mtime_ns
    both = [process(Shard(index, 2), 0.05) for index in (0, 1)]
    times = set()
    while any(each.is_alive() for each in both):
        with contextlib.suppress(FileNotFoundError):  # packed and removed
            times.add(made.part(0).stat().st_mtime_ns)
        time.sleep(0.05)
    assert times <= {before}
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [0, 0]
    found = open_pictures(made.archive)
    assert found.shape == (12, 64, 64, 3)
    orders = [made.order(index) for index in range(12)]
    expected = np.concatenate([to_uint8(pipeline.images([order])) for order in orders])
    assert same(np.concatenate(list(found.blocks(5))), expected)
    assert sorted(each.suffix for each in tmp_path.iterdir()) == [".json", ".npz"]
