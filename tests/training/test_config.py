"""A run that cannot be trained is refused when it is described, in one line."""

import dataclasses
import json
import math
from typing import Any

import pytest

from nsp.errors import ConfigError
from nsp.family.recipe import OptimizerConfig, RunConfig
from nsp.family.recipes import preset


@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed must be a whole number from 0 to 4294967295"):
        dataclasses.replace(preset("smoke"), seed=seed)


def test_the_largest_seed_is_taken() -> None:
    assert dataclasses.replace(preset("smoke"), seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"lr": -1e-3},
        {"lr": math.nan},
        {"lr": math.inf},
        {"betas": (0.9,)},
        {"betas": (0.9, 0.95, 0.99)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"weight_decay": -0.1},
        {"weight_decay_end": -0.1},
        {"warmup_steps": -1},
        {"warmup_start": 1.5},
        {"final_ratio": -0.1},
        {"final_ratio": 0.0, "schedule": "exp"},
        {"grad_clip": 0.0},
        {"grad_clip": math.nan},
    ],
)
def test_an_optimizer_that_cannot_train_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))) as caught:
        OptimizerConfig(**{"lr": 1e-3, **values})
    assert "\n" not in str(caught.value)


def test_a_run_file_with_a_bad_optimizer_is_refused() -> None:
    values = json.loads(json.dumps(preset("smoke").to_dict()))
    values["phases"][0]["optimizer"]["betas"] = [0.9]
    with pytest.raises(ConfigError, match="betas"):
        RunConfig.from_dict(values)
