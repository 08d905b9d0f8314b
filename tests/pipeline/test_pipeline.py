"""What a pipeline promises: bad requests end before the first step, good ones repeat exactly."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsp.errors import BackendError, CheckpointError, ConfigError, EngineError
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from nsp.pipeline.results import to_uint8

PROMPTS = ["red apple", "green apple", "smiling cat"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Pipeline:
    return load_pipeline(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def class_pipe(tiny_class_checkpoint: Path) -> Pipeline:
    return load_pipeline(tiny_class_checkpoint, device="cpu")


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({}, "text-conditional: give one or more prompts"),
    ({"prompts": []}, "give one or more prompts"),
    ({"class_ids": [1]}, "takes prompts, not class ids"),
    ({"prompts": ["cat"], "class_ids": [1]}, "prompts and class ids are both given"),
    ({"prompts": ["cat", " \t"]}, "a prompt is empty"),
    ({"prompts": "red apple"}, r"prompts=\['red apple'\]"),
    ({"prompts": b"cat"}, r"prompts=\[b'cat'\]"),
    ({"prompts": [None]}, "prompt 1 is None, not a text"),
    ({"prompts": ["cat", b"dog"]}, "prompt 2 is b'dog', not a text"),
    ({"prompts": np.array([["cat", "dog"]])}, "prompt 1 is array"),
    ({"prompts": 5}, "prompts must be a list of texts, not 5"),
    ({"prompts": {"cat"}}, "prompts must be a list of texts, not {'cat'}"),
    ({"prompts": ["cat"], "seed": -1}, "seed=-1"),
    ({"prompts": ["cat"], "seed": None}, "seed=None must be an integer"),
    ({"prompts": ["cat"], "seed": 1.5}, "seed=1.5 must be an integer"),
    ({"prompts": ["cat"], "seed": True}, "seed=True must be an integer"),
    ({"prompts": ["cat"], "top_p": 2.0}, "top_p=2.0"),
    ({"prompts": ["cat"], "top_k": 2.5}, "top_k"),
    ({"prompts": ["cat"], "cfg": 3.0}, "unknown argument 'cfg'; known: prompts, class_ids"),
    ({"prompts": ["cat"], "uniforms": np.zeros((2, 30), "float32")}, r"uniforms .* expected"),
    ({"prompts": ["cat"], "uniforms": np.zeros((1, 30))}, "uniforms is float64"),
    ({"prompts": ["cat"], "forced_tokens": np.zeros((1, 29), "int64")}, "forced_tokens"),
    (
        {"prompts": ["cat"], "forced_tokens": np.full((1, 30), 64)},
        r"must be in \[-1, 64\)",
    ),
    ({"prompts": ["cat"], "forced_tokens": np.full((1, 30), -2)}, "forced_tokens must be"),
    (
        {"prompts": ["cat"], "forced_tokens": [[1]]},
        "forced_tokens is a list",
    ),
    ({"prompts": ["cat"], "uniforms": [[0.5]]}, "uniforms is a list; expected"),
    *(
        ({"prompts": ["cat"], "uniforms": np.full((1, 30), value, "float32")}, r"in \[0, 1\)")
        for value in (np.nan, 1.0, -0.1)
    ),
    ({"prompts": ["cat"], "gumbel": np.zeros((1, 30, 64), "float32")}, "gumbel has no effect"),
    *(
        ({"prompts": ["cat"], "more_smooth": True, "gumbel": noise}, message)
        for noise, message in [
            (np.zeros((1, 30, 1), "float32"), "gumbel is float32"),
            (np.full((1, 30, 64), np.nan, "float32"), "gumbel must be finite"),
        ]
    ),
    ({"prompts": ["cat"], "guidance_interval": (0.2, 0.8)}, "guidance_interval.* has no effect"),
    ({"prompts": ["cat"], "guidance_schedule": np.array(["a", "b"])}, "one of ramp, constant"),
]


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS)
def test_a_bad_request_is_refused_before_the_first_step(
    pipe: Pipeline, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipe.stream(**request_)  # not even one next() is needed


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "class-conditional: give one or more class ids"),
        ({"prompts": ["cat"]}, "takes class ids, not prompts"),
        ({"class_ids": []}, "give one or more class ids"),
        ({"class_ids": [0, 11]}, r"class id 11 is outside 0\.\.9 \(10 is the null class\)"),
        ({"class_ids": [-1]}, "class id -1"),
        ({"class_ids": [1.5]}, "list of integers"),
        ({"class_ids": [[1], [2]]}, "list of integers"),
        ({"class_ids": [[1], [1, 2]]}, "list of integers"),
        ({"class_ids": 5}, "list of integers, not 5"),
        ({"class_ids": [True]}, "list of integers"),
        ({"class_ids": [2**70]}, "list of integers"),
        ({"class_ids": "12"}, "list of integers"),
    ],
)
def test_a_class_model_takes_class_ids_only(
    class_pipe: Pipeline, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        class_pipe.stream(**request_)


def test_iterators_and_numpy_values_are_taken(pipe: Pipeline, class_pipe: Pipeline) -> None:
    plain = pipe.generate(prompts=PROMPTS[:2], seed=3, top_k=5, top_p=0.5)
    for prompts in ((text for text in PROMPTS[:2]), np.array(PROMPTS[:2])):
        sampling: dict[str, Any] = {"top_k": np.int64(5), "top_p": np.float32(0.5)}
        made = pipe.generate(prompts=prompts, seed=np.int64(3), **sampling)
        np.testing.assert_array_equal(made.images, plain.images)
        assert made.prompts == tuple(PROMPTS[:2])
        assert type(made.seed) is int
    numbers = class_pipe.generate(class_ids=[1, 2])
    for class_ids in (iter([1, 2]), np.array([1, 2], np.uint8), range(1, 3)):
        made = class_pipe.generate(class_ids=class_ids)
        np.testing.assert_array_equal(made.images, numbers.images)
        assert made.class_ids == (1, 2)


@pytest.mark.parametrize("option", ["precision", "num_threads", "frob"])
def test_a_checkpoint_names_the_options_it_has(tiny_checkpoint: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"no option '{option}'; known: device, verify"):
        load_pipeline(tiny_checkpoint, **{option: 1})


def test_engines_name_the_options_they_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no option 'frob'; known: precision, device"):
        load_pipeline(tmp_path, frob=1)


@pytest.mark.parametrize("device", ["frob", 1.5, ""])
def test_an_unknown_device_is_named(tiny_checkpoint: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match=f"device {device!r} is unknown"):
        load_pipeline(tiny_checkpoint, device=device)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_a_device_that_is_not_here_is_one_line(tiny_checkpoint: Path, device: str) -> None:
    with pytest.raises(BackendError, match=f"torch cannot use {device} on this machine") as caught:
        load_pipeline(tiny_checkpoint, device=device)
    assert "\n" not in str(caught.value)


def test_a_batch_beyond_the_engines_limit_says_how_to_raise_it(pipe: Pipeline) -> None:
    limited = Pipeline(
        pipe.family, pipe.config, pipe.backend, tokenizer=pipe.tokenizer, max_batch=2
    )
    with pytest.raises(ConfigError, match=r"batch of 3 is outside .* 1\.\.2.*--max-batch 3"):
        limited.stream(prompts=PROMPTS)


def test_prompts_and_guidance_matter(pipe: Pipeline) -> None:
    def tokens(prompt: str, guidance_scale: float) -> np.ndarray:
        result = pipe.generate(prompts=[prompt], guidance_scale=guidance_scale, trace=True)
        assert result.trace is not None
        return np.concatenate(result.trace.tokens, axis=1)

    plain = tokens("red apple", 1.0)
    assert (plain != tokens("snow-capped mountain", 1.0)).any()
    assert (plain != tokens("red apple", 4.0)).any()


@pytest.mark.parametrize("until", [1, 2, 3])
def test_scales_after_the_guided_ones_are_those_of_the_condition_alone(
    pipe: Pipeline, until: int
) -> None:
    request = {"prompts": ["red apple", "cat"], "seed": 3, "trace": True}
    part = pipe.generate(**request, guidance_scale=4.0, guidance_until=until).trace
    whole = pipe.generate(**request, guidance_scale=4.0).trace
    assert part is not None
    assert whole is not None
    for scale in range(until):
        np.testing.assert_array_equal(part.tokens[scale], whole.tokens[scale])
    # Without any guidance, on the same tokens so far: an independent way to the same logits.
    alone = pipe.generate(
        **request, guidance_scale=1.0, forced_tokens=np.concatenate(part.tokens, 1)
    ).trace
    assert alone is not None
    for scale in range(until, len(part.tokens)):
        np.testing.assert_array_equal(part.tokens[scale], alone.tokens[scale])
        np.testing.assert_allclose(part.logits[scale], alone.logits[scale], atol=1e-4)


def test_a_trace_has_every_scale(pipe: Pipeline) -> None:
    result = pipe.generate(prompts=PROMPTS[:2], trace=True)
    config = pipe.config
    side = config.image_size_px
    assert result.images.shape == (2, side, side, 3)
    assert result.images.dtype == np.uint8
    assert result.prompts == tuple(PROMPTS[:2])
    trace = result.trace
    assert trace is not None
    lengths = [n * n for n in config.patch_nums]
    assert [t.shape for t in trace.tokens] == [(2, n) for n in lengths]
    assert [t.shape for t in trace.logits] == [(2, n, config.vae.vocab_size) for n in lengths]
    latent = (2, config.vae.latent_channels, config.latent_side, config.latent_side)
    assert [t.shape for t in trace.latents] == [latent] * config.num_scales
    assert trace.image.min() >= 0
    assert trace.image.max() <= 1
    np.testing.assert_array_equal(to_uint8(trace.image), result.images)


def test_a_stream_can_be_watched_and_left(pipe: Pipeline) -> None:
    steps = pipe.stream(prompts=PROMPTS[:1], seed=2)
    first, second = next(steps), next(steps)
    before = first.tokens.copy()
    assert (first.scale, second.scale, second.num_scales) == (0, 1, pipe.config.num_scales)
    assert second.decode().shape == (1, 3, pipe.config.image_size_px, pipe.config.image_size_px)
    whole = pipe.generate(prompts=PROMPTS[:1], seed=2, trace=True)  # decoding changed nothing
    assert whole.trace is not None
    np.testing.assert_array_equal(whole.trace.tokens[1], second.tokens)
    np.testing.assert_array_equal(whole.trace.latents[1], second.latent)
    np.testing.assert_array_equal(first.tokens, before)


def test_given_uniforms_replace_the_seed(pipe: Pipeline) -> None:
    uniforms = np.random.default_rng(0).random((1, pipe.config.num_tokens), np.float32)
    first = pipe.generate(prompts=PROMPTS[:1], seed=0, uniforms=uniforms)
    second = pipe.generate(prompts=PROMPTS[:1], seed=9, uniforms=uniforms)
    np.testing.assert_array_equal(first.images, second.images)


def test_forced_tokens_decide_the_latent_and_sampled_ones_are_still_reported(
    pipe: Pipeline,
) -> None:
    rng = np.random.default_rng(0)
    forced = rng.integers(0, pipe.config.vae.vocab_size, (1, pipe.config.num_tokens))
    first = pipe.generate(prompts=PROMPTS[:1], seed=0, forced_tokens=forced, trace=True)
    second = pipe.generate(prompts=PROMPTS[:1], seed=1, forced_tokens=forced, trace=True)
    assert first.trace is not None
    assert second.trace is not None
    np.testing.assert_array_equal(first.images, second.images)
    for one, other in zip(first.trace.logits, second.trace.logits, strict=True):
        np.testing.assert_array_equal(one, other)
    sampled = [np.concatenate(trace.tokens, axis=1) for trace in (first.trace, second.trace)]
    assert (sampled[0] != sampled[1]).any()


def test_more_smooth_draws_its_noise_from_the_seed(pipe: Pipeline) -> None:
    runs = [pipe.generate(prompts=PROMPTS[:1], seed=s, more_smooth=True).images for s in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_greedy_sampling_ignores_the_seed(pipe: Pipeline) -> None:
    runs = [pipe.generate(prompts=PROMPTS[:1], seed=s, top_k=1).images for s in (0, 1)]
    np.testing.assert_array_equal(*runs)


def test_an_over_long_prompt_is_cut_and_the_lost_tail_is_said(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pipe.stream(prompts=["red apple " * 20])
    assert "dropped" in caplog.text


@pytest.mark.parametrize(
    ("values", "expected"),
    [((-1.0, 0.0, 0.5 / 255), (0, 0, 0)), ((0.5, 1.0, 7.0), (128, 255, 255))],
)
def test_pixels_are_clipped_and_rounded(
    values: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    image = np.array(values, np.float32).reshape(1, 3, 1, 1)
    assert to_uint8(image).shape == (1, 1, 1, 3)
    np.testing.assert_array_equal(to_uint8(image).ravel(), expected)


def test_engines_backends_do_not_run_checkpoints(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"only the torch backend can run.*nsp export"):
        load_pipeline(tiny_checkpoint, backend="onnxruntime")


@pytest.mark.parametrize("make", [lambda folder: None, Path.mkdir])
def test_a_folder_without_a_model_says_what_to_run(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises((EngineError, CheckpointError), match="nsp export"):
        load_pipeline(folder)
