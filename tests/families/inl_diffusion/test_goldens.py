"""Converted weights sample and train as the public code does, by the public interface."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nsp.diffusion.noise import Betas
from nsp.families.inl_diffusion import objective
from nsp.families.inl_diffusion.loop import INIT
from nsp.families.inl_diffusion.objective import DitObjective, DitSettings
from nsp.families.inl_diffusion.sampling import InlSampling
from nsp.family.order import Order
from nsp.family.registry import family
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from tests.families.inl_diffusion.golden import NULL, golden, prompt_of
from tests.goldens.inl_tiny.fixtures import tensors

# Absolute: eight guided steps amplify the rounding of the first ones, and the public float32 tables
# have 1 - A of the last timesteps with four digits alone.
_GUIDED, _DDPM = 5e-4, 2e-4
_GUIDANCE = 4.0
_LOSS, _GRADIENT = 1e-5, 1e-6
PROMPTS = [prompt_of(row) for row in tensors("text.")["input_ids"]]
PIPE = tensors("pipe.")


def _pipeline(betas: Betas = "scaled_linear") -> Pipeline:
    return torch_pipeline(family("inl_diffusion"), golden(betas), device="cpu")


@contextmanager
def _latents(pipeline: Pipeline) -> Iterator[list[NDArray[np.float32]]]:
    """Collect the latent after every step; a step shows the picture it expects instead."""
    backend, found = pipeline.backend, []
    run = backend.run

    def recording(stage: str, feeds: Mapping[str, Any]) -> Any:
        made = run(stage, feeds)
        if stage == "denoise":
            latent = backend.download(made["new_latent"])
            found.append(latent.reshape(*latent.shape[:2], 8, 8).copy())
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backend, "run", recording)
        yield found


def _orders(sampling: InlSampling, **given: Any) -> list[Order[InlSampling]]:
    rows = [{name: array[row] for name, array in given.items()} for row in range(len(PROMPTS))]
    return [
        Order(prompt, 0, sampling, negative=NULL, given=each)
        for prompt, each in zip(PROMPTS, rows, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "betas", "num_steps", "guidance"),
    [
        ("ddim_scaled_linear", "scaled_linear", 8, _GUIDANCE),
        ("ddim_linear", "linear", 5, _GUIDANCE),
        ("ddim_cosine", "cosine", 6, _GUIDANCE),
        ("ddim_noguide", "scaled_linear", 8, 1.0),
    ],
)
def test_a_pipeline_samples_as_the_public_one(
    name: str, betas: Betas, num_steps: int, guidance: float
) -> None:
    pipeline = _pipeline(betas)
    sampling = InlSampling(num_inference_steps=num_steps, guidance_scale=guidance)
    if name != "ddim_noguide":
        times = sampling.table(pipeline.config.noise).timesteps
        assert times.tolist() == PIPE[f"{name}.timesteps"].tolist()
    with _latents(pipeline) as found:
        image = pipeline.images(_orders(sampling, noise=PIPE["noise"].numpy()))
    assert np.abs(np.stack(found) - PIPE[f"{name}.trace"].numpy()).max() < _GUIDED
    if f"{name}.image" in PIPE:
        assert np.abs(image - PIPE[f"{name}.image"].numpy()).max() < _GUIDED


def test_the_last_steps_of_ddpm_are_the_public_ones() -> None:
    """Ten of 1000 steps, from a noisy picture: the public loop begins at timestep 9."""
    pipeline, io = _pipeline(), {n: t.numpy() for n, t in PIPE.items()}
    owner, config = pipeline.family, pipeline.config
    sampling = InlSampling(
        num_inference_steps=1000, sampler="ddpm", strength=0.01, guidance_scale=_GUIDANCE
    )
    picture = np.zeros((2, 3, 64, 64), np.float32)
    orders = _orders(sampling, **{INIT: picture})
    assert pipeline.prompts is not None
    text = pipeline.prompts.encode(PROMPTS, [owner.null_prompt(config, each) for each in orders])
    inputs = owner.inputs(config, orders, text)
    assert inputs["timestep"].tolist() == io["ddpm_consecutive.timesteps"].tolist()
    # The noise of an order is drawn from its seed: the golden's takes its place, and where the
    # picture begins.
    noises = {f"noise_{k}": noise for k, noise in enumerate(io["ddpm_consecutive.step_noise"])}
    begun = {**inputs, **noises, "latent": io["ddpm_consecutive.start"]}
    for name in (INIT, "start_noise", "nowhere", "level_start"):
        del begun[name]
    backend = pipeline.backend
    uploaded = {name: backend.upload(array) for name, array in begun.items()}
    with torch.no_grad(), _latents(pipeline) as found:
        *_, last = owner.loop(backend, config, uploaded)
    assert np.abs(np.stack(found) - io["ddpm_consecutive.trace"]).max() < _DDPM
    assert last.latent is not None
    image = pipeline.decode(last.latent)
    assert np.abs(image - io["ddpm_consecutive.image"]).max() < _DDPM


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> DitObjective:
    """The objective of the golden model, which draws the golden noise and timesteps."""
    io = tensors("train.")
    kept_prompts = torch.ones(2)
    uniforms = torch.stack([kept_prompts, (io["timesteps"] + 0.5) / 1000], 1)
    monkeypatch.setattr(objective, "sample_normals", lambda key, count: io["noise"].flatten(1))
    monkeypatch.setattr(objective, "sample_uniforms", lambda key, count: uniforms)
    golden.cache_clear()  # it is trained here
    settings = DitSettings(cond_drop_rate=0.0, train_text_encoder=False)
    data: Any = None  # its pictures are not used
    made = DitObjective(golden(), data, settings)
    golden.cache_clear()
    return made.train()


def _batch() -> dict[str, Any]:
    ids, latent = tensors("text.")["input_ids"], tensors("vae.")["latent_mode"]
    return {"latents": [latent], "condition": ids, "key": torch.zeros(2)}


def test_loss_and_gradients_are_the_public_ones(trained: DitObjective) -> None:
    io = tensors("train.")
    loss = trained(_batch())["loss"]
    assert abs(loss.item() - io["loss"].item()) < _LOSS
    loss.backward()
    dit = trained.system.dit
    assert dit.null_embedding.grad is None
    norm = torch.nn.utils.clip_grad_norm_(dit.parameters(), 1e9)
    assert abs(norm.item() - io["grad_norm"].item()) < _LOSS
    wanted = {n.removeprefix("grad."): t for n, t in io.items() if n.startswith("grad.")}
    assert len(wanted) == 5
    for name, gradient in wanted.items():
        found = dit.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, atol=_GRADIENT, rtol=1e-5)


def test_three_steps_of_adamw_are_the_public_ones(trained: DitObjective) -> None:
    dit, losses = trained.system.dit, []
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-4, weight_decay=0.01)
    for _ in range(3):
        loss = trained(_batch())["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
    assert np.abs(np.array(losses) - tensors("train.")["adamw_losses"].numpy()).max() < _LOSS
