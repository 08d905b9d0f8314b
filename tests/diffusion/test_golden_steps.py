"""DDPM and DDIM equal the steps of the first implementation of INL-Diffusion."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nsp.diffusion.noise import Betas, Noise, Prediction
from nsp.diffusion.samplers import COLUMNS, Table, table
from tests.goldens.inl_tiny.fixtures import tensors

_ROW = {name: index for index, name in enumerate(COLUMNS)}
_TIMES = (0, 120, 840)
_INL = Noise(clip=1.0, ends_at_first=True)


def _arrays(prefix: str = "") -> dict[str, Any]:
    return {name: each.numpy() for name, each in tensors(prefix).items()}


@pytest.mark.parametrize("betas", ["linear", "cosine", "scaled_linear"])
def test_noise_levels_are_those_of_the_public_tables(betas: Betas) -> None:
    tables = _arrays()
    noise = Noise(betas=betas, smallest_beta=1e-4, largest_beta=0.9999)
    wanted = tables[f"sched.table.{betas}.betas"]
    assert np.allclose(noise.beta_values(), wanted, atol=1e-6, rtol=1e-4)
    assert np.allclose(noise.kept(), tables[f"sched.table.{betas}.alphas_cumprod"], atol=1e-6)


def _step(row: NDArray[Any], values: dict[str, Any], noise: Any) -> NDArray[Any]:
    x, output = values["sample"], values["model_output"]
    k = {name: row[index] for name, index in _ROW.items()}
    x0 = np.clip(k["a"] * x + k["b"] * output, -k["c"], k["c"])
    found: NDArray[Any] = k["d"] * x + k["e"] * output + k["f0"] * x0 + k["n"] * noise
    return found


def _row(steps: Table, time: int) -> NDArray[Any]:
    found: NDArray[Any] = steps.rows[list(steps.timesteps).index(time)]
    return found


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("time", _TIMES)
def test_ddpm_makes_the_public_step(prediction: Prediction, time: int) -> None:
    values = _arrays(f"sched.ddpm.{prediction}.t{time}.")
    steps = table(dataclasses.replace(_INL, prediction=prediction), "ddpm", 1000)
    found = _step(_row(steps, time), values, values["noise"])
    # At timestep 0 the public float32 tables have 1 - A_0 with four digits alone.
    assert np.allclose(found, values["prev_sample"], atol=2e-5 if time else 2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("time", _TIMES)
def test_ddim_makes_the_public_step(prediction: Prediction, time: int, eta: float) -> None:
    values = _arrays(f"sched.ddim.{prediction}.t{time}.")
    steps = table(dataclasses.replace(_INL, prediction=prediction), "ddim", 25, eta=eta)
    row = _row(steps, time).copy()
    if prediction != "epsilon":
        # The public step adds the model's output here as if it were ε, which it is not; ours adds
        # the ε that follows from it. With the output in its place all other numbers are the same.
        epsilon = _row(table(_INL, "ddim", 25, eta=eta), time)
        row[_ROW["d"]], row[_ROW["e"]] = epsilon[_ROW["d"]], epsilon[_ROW["e"]]
    found = _step(row, values, values["noise"])
    assert np.allclose(found, values[f"prev_sample_eta{eta:g}"], atol=2e-5)
