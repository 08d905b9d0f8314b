"""What a pipeline promises that is shared: with other processes, with threads, with its streams."""

import copy
import gc
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.errors import CheckpointError, ConfigError
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, load_pipeline, torch_pipeline
from tests.artifacts.engine_folders import write_engines
from tests.models import new_tiny_checkpoint

PROMPTS = ["red apple", "green apple", "smiling cat", "blue circle"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Pipeline:
    return load_pipeline(tiny_checkpoint, device="cpu")


def picture(pipe: Pipeline, number: int) -> NDArray[np.uint8]:
    return pipe.generate(prompts=[PROMPTS[number % 4]], seed=number).images


@pytest.mark.parametrize("send", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_pipeline_loads_again_where_it_is_sent(
    pipe: Pipeline, send: Callable[[Pipeline], Pipeline]
) -> None:
    there = send(pipe)
    assert there.backend is not pipe.backend
    assert len(pickle.dumps(pipe)) < 2000  # a path, not weights
    np.testing.assert_array_equal(picture(there, 3), picture(pipe, 3))


def test_options_and_defaults_travel_with_a_pipeline(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    write_engines(tmp_path / "engines", precisions=("fp32", "fp16"))
    monkeypatch.chdir(tmp_path)
    here = load_pipeline("engines", "onnxruntime", precision="fp16", num_threads=1)
    here.sampling = here.sampling.changed({"top_k": 7})
    sent = pickle.dumps(here)
    monkeypatch.chdir("/")
    there = pickle.loads(sent)
    assert (there.precision, there.backend.num_threads, there.sampling.top_k) == ("fp16", 1, 7)


def test_a_worker_that_is_started_anew_has_the_pipeline(tmp_path: Path) -> None:
    write_engines(tmp_path, precisions=("fp16",))
    here = load_pipeline(tmp_path, "onnxruntime", num_threads=1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(attrgetter("precision", "model_hash"), (here,))
    assert there == (here.precision, here.model_hash)


def test_a_shallow_copy_shares_the_backend_and_its_turns(pipe: Pipeline) -> None:
    other = copy.copy(pipe)
    assert other.backend is pipe.backend
    assert other.turn is pipe.turn


def test_a_pipeline_made_in_memory_says_that_it_cannot_be_sent(tiny_checkpoint: Path) -> None:
    record = read_checkpoint(tiny_checkpoint)
    made = torch_pipeline(family("var"), record.load(), device="cpu")
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ConfigError, match=r"nsp\.load_pipeline\(path\)"):
            send(made)


def test_a_folder_that_holds_another_model_by_now_is_refused(tmp_path: Path) -> None:
    folder = new_tiny_checkpoint(tmp_path / "checkpoint")
    pipe = load_pipeline(folder, device="cpu")
    pipe.model_hash = "f" * 64
    with pytest.raises(CheckpointError, match="has another model"):
        pickle.loads(pickle.dumps(pipe))


def test_threads_that_share_a_pipeline_get_the_pictures_they_would_get_alone(
    pipe: Pipeline,
) -> None:
    alone = [picture(pipe, number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: picture(pipe, number), range(8)))
    np.testing.assert_array_equal(np.stack(together), np.stack(alone))


def test_streams_and_pictures_take_turns(pipe: Pipeline) -> None:
    """In one thread and in another: a stream is halfway while others begin and end."""
    expected = [step.latent for step in pipe.stream(prompts=["red apple"], seed=5)]
    stream = pipe.stream(prompts=["red apple"], seed=5)
    other = pipe.stream(prompts=["smiling cat"], seed=6)
    steps = [next(stream)]
    next(other)
    picture(pipe, 1)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(picture, pipe, 2).result()
        steps.append(pool.submit(next, stream).result())
    steps += stream
    for step, latent in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.latent, latent)


def test_two_threads_may_ask_one_stream_for_its_steps(pipe: Pipeline) -> None:
    stream = pipe.stream(prompts=["red apple"], seed=5)
    count = len(list(pipe.stream(prompts=["red apple"], seed=5)))
    with ThreadPoolExecutor(4) as pool:
        steps = list(pool.map(lambda _: next(stream, None), range(count + 3)))
    made = sorted(step.scale for step in steps if step is not None)
    assert made == list(range(count))


@pytest.mark.parametrize("how", ["closed", "dropped", "kept"])
def test_an_abandoned_stream_holds_nobody_up(pipe: Pipeline, how: str) -> None:
    stream = pipe.stream(prompts=["red apple"])
    next(stream)
    if how == "closed":
        stream.close()  # type: ignore[attr-defined]
        assert list(stream) == []
    elif how == "dropped":
        del stream
        gc.collect()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(picture, pipe, 1).result(timeout=60).shape == (1, 16, 16, 3)
