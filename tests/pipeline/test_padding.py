"""Batches are padded to sizes that a backend has: nobody sees it, and recordings stay few."""

import gc
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nsp import cli
from nsp.artifacts.checkpoint import read_checkpoint
from nsp.backends.tensorrt import replay
from nsp.backends.torch import TorchBackend
from nsp.console.gallery import generate_gallery
from nsp.errors import ConfigError
from nsp.family.order import Order, Sampling
from nsp.pipeline.orders import cut_batches, make_orders
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from tests.backends.machine import Machine
from tests.families.next_scale.models import new_tiny_checkpoint

PROMPTS = ("red apple", "green apple", "cat", "dog")
_ERROR = 1e-5  # of pictures in [0, 1]: what rounds with another batch, in float32


@pytest.fixture(scope="module")
def text_system(tiny_checkpoint: Path) -> Any:
    return read_checkpoint(tiny_checkpoint).load()


@pytest.fixture
def machine(text_system: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(text_system, tmp_path, monkeypatch)


@pytest.fixture
def static_pipe(machine: Machine) -> Pipeline:
    """Return engines for full batches of four, on the stand-in, which refuses all others."""
    machine.write_plans(max_batch=4, static_batch=True)
    pipe = machine.load()
    pipe.max_batch = 4
    return pipe


@pytest.fixture
def frozen_garbage() -> Iterator[None]:
    """Every capture collects garbage, which takes 0.2 s with all that torch brings."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("max_batch", "sizes"), [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8))])
def test_batches_are_padded_to_powers_of_two_and_the_largest(
    machine: Machine, max_batch: int, sizes: tuple[int, ...]
) -> None:
    machine.write_plans(max_batch=max_batch)
    backend = machine.load().backend
    assert backend.batch_sizes == sizes
    assert backend.padded_batch_size(max_batch + 1) == max_batch + 1  # for the engine to refuse
    machine.write_plans(max_batch=max_batch, static_batch=True)
    assert machine.load().backend.batch_sizes == (max_batch,)


def test_engines_of_full_batches_make_any_number_of_images(
    machine: Machine, static_pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="nsp.pipeline.runner")
    reference = machine.reference()
    for count in (1, 2, 3, 4) * 3:  # run, captured, replayed
        request: dict[str, Any] = {"prompts": PROMPTS[:count], "seed": 3, "top_k": 5}
        found = static_pipe.generate(**request, trace=True).trace
        expected = reference.generate(**request, trace=True).trace
        assert found is not None
        assert expected is not None
        for name in ("tokens", "logits", "latents"):
            for here, there in zip(getattr(found, name), getattr(expected, name), strict=True):
                np.testing.assert_allclose(here, there, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(found.image, expected.image, atol=_ERROR)
        whole = static_pipe.generate(**request).images
        assert np.abs(whole.astype(int) - reference.generate(**request).images).max() <= 1
    assert static_pipe.num_padding_rows == 2 * 3 * (3 + 2 + 1)
    assert "a batch of 3 is padded to 4" in caplog.text
    assert len({each.key[0] for each in static_pipe.backend._recorder._recordings}) == 2
    assert len(static_pipe.backend._recorder._recordings) == 2


def test_every_step_has_the_rows_that_were_asked_for(static_pipe: Pipeline) -> None:
    for step in static_pipe.stream(prompts=PROMPTS[:3], seed=1):
        assert len(step.latent) == len(step.tokens) == len(step.logits) == 3
        assert step.decode().shape[0] == 3


def test_full_batches_serve_calls_and_galleries_of_any_size(
    static_pipe: Pipeline, tmp_path: Path
) -> None:
    orders = make_orders(static_pipe.sampling, prompts=["red apple"], num_images=5)
    assert cut_batches(static_pipe, orders) == [[0, 1, 2, 3], [4]]
    assert cut_batches(static_pipe, orders, 1) == [[0, 1, 2, 3], [4]]  # a smaller one costs as much
    gallery = generate_gallery(static_pipe, orders[:3], tmp_path, batch_size=4)
    assert len(gallery.images) == 3
    assert len(static_pipe("red apple", num_images_per_prompt=5).images) == 5
    assert static_pipe.num_padding_rows == 1 + 3
    with pytest.raises(ConfigError, match=r"batch of 5 is outside the engine's 1\.\.4"):
        static_pipe.generate(prompts=["red apple"] * 5)


def test_backends_that_record_nothing_pad_nothing(tiny_checkpoint: Path) -> None:
    pipe = load_pipeline(tiny_checkpoint, device="cpu")
    assert pipe.backend.batch_sizes == ()
    pipe.generate(prompts=PROMPTS[:3])
    assert pipe.num_padding_rows == 0


def test_generate_makes_any_number_of_images(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchBackend, "batch_sizes", (4,))
    words = ["--checkpoint", str(tiny_checkpoint), "--device", "cpu", "--output-dir", str(tmp_path)]
    words += ["--prompt", "red apple", "--num-images", "3"]
    result = CliRunner().invoke(cli.main, ["generate", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*_red-apple_seed*.png"))) == 3


@pytest.mark.parametrize("family", ["var", "next_scale"])
def test_padding_changes_no_image_of_any_family(
    family: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tiny_checkpoint if family == "var" else new_tiny_checkpoint(tmp_path / "checkpoint")
    pipe = load_pipeline(folder, device="cpu")
    orders = [Order(prompt, n, pipe.sampling) for n, prompt in enumerate(PROMPTS[:3])]
    expected = pipe.images(orders)
    steps = [pipe.download(step.latent) for step in pipe.run(orders)]
    pipe.backend.batch_sizes = (2, 5)
    np.testing.assert_allclose(pipe.images(orders), expected, atol=_ERROR)
    for step, latent in zip(pipe.run(orders), steps, strict=True):
        np.testing.assert_allclose(pipe.download(step.latent), latent, atol=1e-4)
        assert pipe.decode(step.latent).shape[0] == 3
    assert pipe.num_padding_rows == 4


# Settings of one batch: top-k and top-p that share a bucket of ranks.
_BUCKETS = (
    {"top_k": (0, 1), "top_p": (1.0,)},  # 1 rank
    {"top_k": (3, 4), "top_p": (0.5, 1.0)},  # 4 ranks
    {"top_k": (0,), "top_p": (0.5, 0.9)},  # all codes
)


def drawn_batch(rng: random.Random, pipe: Pipeline, number: int) -> list[Order[Sampling]]:
    """Return a batch of mixed settings that orders of one batch may have."""
    bucket, guidance = rng.choice(_BUCKETS), rng.choice([(1.0,), (1.5, 3.0)])
    nulls = rng.choice([(None,), (None, "dog", "green apple")])
    return [
        Order(
            rng.choice(PROMPTS),
            10 * number + row,
            pipe.sampling.changed(
                {
                    **{name: rng.choice(values) for name, values in bucket.items()},
                    "guidance_scale": rng.choice(guidance),
                    "temperature": rng.choice([0.7, 1.0]),
                }
            ),
            rng.choice(nulls),
        )
        for row in range(rng.randint(1, pipe.max_batch or 1))
    ]


@pytest.mark.usefixtures("frozen_garbage")
def test_two_hundred_random_batches_need_few_recordings(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write_plans(max_batch=4)
    pipe, reference, made = machine.load(), machine.reference(), list[Any]()
    pipe.max_batch = 4
    record = replay.Recorder._new
    monkeypatch.setattr(
        replay.Recorder, "_new", lambda own, key, *rest: made.append(key) or record(own, key, *rest)
    )
    rng, rows, computed = random.Random(0), 0, 0
    for number in range(200):
        orders = drawn_batch(rng, pipe, number)
        images = pipe.images(orders)
        rows, computed = rows + len(images), computed + pipe.backend.padded_batch_size(len(images))
        if number % 10 == 0:
            row = rng.randrange(len(orders))
            alone = reference.images([orders[row]])[0]
            np.testing.assert_allclose(images[row], alone, atol=_ERROR, err_msg=str(orders[row]))
    guided, prompts = 2, 2  # or not; B or 2B
    bound = len(pipe.backend.batch_sizes) * guided * prompts * len(_BUCKETS)
    assert len(set(made)) <= bound == 36
    assert len(pipe.backend._recorder._recordings) <= replay._MAX_RECORDINGS
    assert pipe.num_padding_rows == computed - rows > 0
