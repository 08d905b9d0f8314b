"""What every argument promises: a value that is allowed, or one clear line, never a traceback."""

import contextlib
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nsp import train, values
from nsp.cli import main
from nsp.errors import ConfigError, NspError
from nsp.families.var.sampling import VarSampling
from nsp.pipeline.orders import MAX_IMAGES, make_orders
from nsp.pipeline.pipeline import Pipeline, load_pipeline
from tests.artifacts.engine_folders import write_engines


class Unshowable:
    def __repr__(self) -> str:
        raise ValueError("cannot be shown")


NUMBERS: list[Any] = [0, 1, -1, 2**63, 10**30, -(10**30), 10**5000, 1.5, float("nan"), 1e308 * 10]
NUMBERS += [True, False, np.int64(1), np.float32(0.5), np.float64("nan"), np.bool_(True)]
ARRAYS: list[Any] = [np.array(1), np.array([1, 2]), np.array([]), np.zeros((1, 30), "float32")]
TEXTS: list[Any] = ["", "x", "auto", "\ud800", "\udcff", "a\0b", "a\nb", "x" * 100_000, b"b"]
OTHERS: list[Any] = [None, [], [1], ["x"], {}, {"a": 1}, (1.0, 2.0), {1}, range(3), object(), int]
OTHERS += [Unshowable(), 1 + 2j, Fraction(1, 2), Path("/"), lambda: 1]
ANYTHING = [*NUMBERS, *ARRAYS, *TEXTS, *OTHERS]


def refused(check: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_a_numpy_scalar_is_the_number_it_holds() -> None:
    for found in (values.count("n", np.int8(3)), values.seed(np.uint64(3))):
        assert (found, type(found)) == (3, int)
    assert type(values.real("x", np.float32(0.5), least=0, most=1)) is float
    assert values.flag("f", np.bool_(True)) is True
    assert values.flag("f", 0) is False


@pytest.mark.parametrize("value", [True, 0, -1, 1.0, "1", None, 10**30, np.array(1), [1]])
def test_what_is_no_number_of_things_is_refused(value: Any) -> None:
    assert refused(lambda: values.count("n", value)).startswith("n must be")
    assert "16610 bits" in refused(lambda: values.count("n", 10**5000))


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), 2, -0.1, 10**400, 1j, [0.5]])
def test_what_is_no_number_in_a_range_is_refused(value: Any) -> None:
    assert "a number from 0 to 1" in refused(lambda: values.real("x", value, least=0, most=1))


@pytest.mark.parametrize("value", [2, 1.0, "yes", None, [], np.array([True]), np.array(1)])
def test_what_is_no_truth_value_is_refused(value: Any) -> None:
    assert "True or False" in refused(lambda: values.flag("trace", value))


@pytest.mark.parametrize("value", ["\ud800", "a\0b", b"a", None, 1, ["a"]])
def test_what_is_no_path_is_refused(value: Any) -> None:
    assert refused(lambda: values.path("path", value)).startswith("path ")


def test_a_path_of_bytes_that_are_not_utf_8_is_one() -> None:
    assert values.path("path", "caf\udce9") == Path("caf\udce9")


def test_guidance_until_beyond_the_scales_is_all_of_them() -> None:
    everywhere = VarSampling().guidance_per_scale(5)
    for until in (5, 6, 10**30):
        assert VarSampling(guidance_until=until).guidance_per_scale(5) == everywhere


@pytest.mark.parametrize("name", ["guidance_until", "top_k"])
def test_integers_of_configurations_have_a_bound(name: str) -> None:
    assert "bits is too large" in refused(lambda: VarSampling.from_dict({name: 10**30}))


def test_more_images_than_a_run_makes_are_refused_before_they_are_listed() -> None:
    for count in (10**11, MAX_IMAGES // 2 + 1):
        message = refused(
            lambda count=count: make_orders(VarSampling(), prompts=["a", "b"], num_images=count)
        )
        assert "num_images must be at most" in message or f"at most {MAX_IMAGES}" in message


GENERATE = ["prompts", "class_ids", "seed", "trace", "uniforms", "forced_tokens", "gumbel", "noise"]
GENERATE += [*VarSampling().to_dict(), "frob"]
LOAD = ["path", "backend", "precision", "device", "num_threads", "verify"]


def assert_no_bug(random_call: Callable[[], Any]) -> None:
    with contextlib.suppress(NspError):  # its line is one, see `nsp.errors`
        random_call()


def test_no_argument_of_python_ends_in_a_traceback(tiny_checkpoint: Path, tmp_path: Path) -> None:
    draw = random.Random(13)
    write_engines(tmp_path)
    pipes: list[tuple[Pipeline, dict[str, Any]]] = [
        (load_pipeline(tiny_checkpoint, device="cpu"), {"prompts": ["cat"]}),
        (load_pipeline(tmp_path, num_threads=1), {"class_ids": [1]}),
    ]
    for _ in range(500):
        pipe, request = draw.choice(pipes)
        odd = {
            name: draw.choice(ANYTHING) for name in draw.choices(GENERATE, k=draw.choice((1, 1, 2)))
        }
        assert_no_bug(lambda: pipe.generate(**{**request, **odd}))  # noqa: B023
    for _ in range(200):
        odd = {name: draw.choice(ANYTHING) for name in draw.choices(LOAD, k=draw.choice((1, 1, 2)))}
        path = odd.pop("path", tmp_path)
        assert_no_bug(lambda: load_pipeline(path, **odd))  # noqa: B023


def test_no_option_of_the_command_line_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(13)
    write_engines(tmp_path / "engines", max_batch=2)
    monkeypatch.chdir(tmp_path)
    given = ["0", "-1", "1.5", "nan", "-inf", "1e400", str(10**30), "9" * 5000, "", "x", "\udcff"]
    given += [
        "\ud800",
        "a\0b",
        "a\nb",
        "y" * 5000,
        "cat",
        "cuda",
        "engines",
        "nowhere",
        "/dev/null",
    ]
    lines = {
        "generate": ["generate", "--class-id", "1", "--output-dir", "out"],
        "verify": ["verify", "engines"],
        "export": ["export", "--dry-run", "--engine-dir", "new"],
        "train": ["--preset", "smoke", "--phase", "none", "--output-dir", "run"],
    }
    for _ in range(150):
        verb = draw.choice(list(lines))
        command = train.main if verb == "train" else main.commands[verb]
        options = [each for each in command.params if each.param_type_name == "option"]
        arguments = list(lines[verb])
        for option in draw.choices(options, k=draw.choice((1, 2))):
            if option.name not in ("help", "targets", "preset"):
                arguments.append(option.opts[0])
                arguments += [] if option.is_flag else draw.choices(given, k=option.nargs)  # type: ignore[attr-defined]
        result = CliRunner().invoke(train.main if verb == "train" else main, arguments)
        if result.exit_code:
            assert isinstance(result.exception, SystemExit), arguments
            lines_of_errors = [x for x in result.stderr.splitlines() if x[:5].lower() == "error"]
            assert len(lines_of_errors) == 1, arguments
