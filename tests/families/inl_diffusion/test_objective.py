"""What the transformer's objective promises: its null condition, and states computed once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.families.inl_diffusion.config import SIZES, NullCondition
from nsp.families.inl_diffusion.learn import InlLearner
from nsp.families.inl_diffusion.objective import DitObjective, DitSettings, reading
from nsp.families.inl_diffusion.system import InlSystem
from nsp.family.objective import Batch, TokenCache, TrainingData
from nsp.text.parts import TextEncoderSettings
from nsp.training.data_order import Share, sample_keys, sample_uniforms
from nsp.training.text_states import TextStates
from tests.training.pictures import write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    source = open_source(write_pictures(tmp_path_factory.mktemp("pictures")))
    return ImageDataset(source, 8, train=True, crop=False)


def new_system(pictures: ImageDataset, null_condition: NullCondition = "learned") -> InlSystem:
    torch.manual_seed(0)
    config = dataclasses.replace(SIZES["tiny"], null_condition=null_condition)
    settings = TextEncoderSettings(vocab_size=600, depth=1, num_heads=2)
    system = InlLearner().new_system(config, settings, pictures.source)
    with torch.no_grad():
        for parameter in system.dit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return system.eval()


def objective_of(
    system: InlSystem, pictures: ImageDataset, cache: TokenCache | None = None, **settings: object
) -> DitObjective:
    data = TrainingData(pictures, cache=cache)
    return DitObjective(system, data, DitSettings.from_dict(settings))


def batch_of(objective: DitObjective, count: int = 8) -> Batch:
    data = objective.dataset()
    items = [data[index] for index in range(count)]
    batch = torch.utils.data.default_collate(items)
    batch["key"] = sample_keys(Share(batch_size=count), 0, 0, seed=0)
    return batch  # type: ignore[no-any-return]


@pytest.mark.parametrize("trained", [True, False])
def test_the_learned_null_condition_learns(pictures: ImageDataset, trained: bool) -> None:
    """In the public training it never has a gradient."""
    system = new_system(pictures)
    objective = objective_of(system, pictures, cond_drop_rate=0.5, train_text_encoder=trained)
    batch = batch_of(objective)
    dropped = sample_uniforms(batch["key"], 2)[:, 0] < 0.5
    assert dropped.any()
    assert not dropped.all()
    objective.train()(batch)["loss"].backward()
    null = system.dit.null_embedding.grad
    assert null is not None
    assert null.abs().max() > 0


@pytest.mark.parametrize("trained", [True, False])
def test_with_no_learned_null_a_dropped_prompt_is_the_empty_one(
    pictures: ImageDataset, trained: bool
) -> None:
    system = new_system(pictures, "empty_prompt")
    settings = {"cond_drop_rate": 0.999_999, "train_text_encoder": trained}
    objective = objective_of(system, pictures, **settings).train()
    batch = batch_of(objective)
    found = objective(batch)["loss"]
    empty = system.encode_prompts([""]).expand(len(batch["key"]), -1)
    kept = objective_of(system, pictures, cond_drop_rate=0.0, train_text_encoder=True).train()
    torch.testing.assert_close(found, kept({**batch, "condition": empty})["loss"])
    real = objective_of(system, pictures, cond_drop_rate=0.0, train_text_encoder=True).train()
    assert not torch.allclose(found, real(batch_of(real))["loss"], atol=1e-7)
    assert not system.dit.null_embedding.requires_grad


def test_a_frozen_encoder_reads_every_caption_once(
    pictures: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = new_system(pictures)
    calls, context = 0, InlSystem.context

    def counted(self: InlSystem, *given: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += len(given[0])
        return context(self, *given)

    monkeypatch.setattr(InlSystem, "context", counted)
    objective = objective_of(system, pictures, train_text_encoder=False).train()
    batch = batch_of(objective)
    assert calls == len(set(pictures.captions()))
    cached = objective(batch)["loss"]
    assert calls == len(set(pictures.captions()))
    live = objective_of(system, pictures).train()
    # The kept states are float16.
    torch.testing.assert_close(cached, live(batch_of(live))["loss"], rtol=2e-3, atol=0)


def test_states_are_kept_with_the_run_until_encoder_or_captions_change(
    pictures: ImageDataset, tmp_path: Path
) -> None:
    system, captions = new_system(pictures), ["a", "b", "a"]
    cache = TokenCache(tmp_path / "tokens.safetensors")
    first = TextStates(reading(system), captions, cache)
    (file,) = tmp_path.glob("text_states-*.npy")
    assert np.load(file).dtype == np.float16
    assert len(np.load(file)) == 2
    assert len(first) == 3
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    written = file.stat().st_mtime_ns
    again = TextStates(reading(system), captions, cache)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(again[1], first[1])
    with torch.no_grad():
        next(system.text_encoder.parameters()).add_(0.1)
    TextStates(reading(system), captions, cache)
    assert not file.exists()
    assert len([*tmp_path.glob("text_states-*.npy")]) == 1


def test_states_are_not_written_beside_a_cache_of_the_user(
    pictures: ImageDataset, tmp_path: Path
) -> None:
    given = TokenCache(tmp_path / "latents.safetensors", is_given=True)
    found = TextStates(reading(new_system(pictures)), ["a"], given)
    assert found[0].dtype == torch.float16
    assert not [*tmp_path.iterdir()]
