import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nsp.benchmarks.contest.parity import MAX_FLIPS, _kl, compare, psnr_db
from nsp.benchmarks.record.parity import Parity
from nsp.errors import ParityError
from nsp.pipeline.pipeline import Pipeline, torch_pipeline

PROMPTS = ["red apple", "smiling cat", "snow-capped mountain"]
REQUESTS = [{"prompts": PROMPTS, "seed": 0}]


def changed(reference: Pipeline, system: Any, change: Any) -> Pipeline:
    """Return a pipeline of the same model after `change` was applied to a copy of its weights."""
    other = copy.deepcopy(system)
    with torch.no_grad():
        change(other)
    return torch_pipeline(reference.family, other, device="cpu")


def test_a_model_agrees_with_itself_entirely(reference: Pipeline, tiny_system: Any) -> None:
    found = compare(reference, changed(reference, tiny_system, lambda s: None), REQUESTS)
    assert len(found.steps) == reference.config.num_scales
    assert found.max_relative_error == 0
    assert found.token_agreement == found.free_token_agreement == 1
    assert (found.num_flips, found.flips, found.first_divergent_step) == (0, (), None)
    assert found.forced_psnr_db is None
    assert found.free_psnr_db is None


def test_batches_cover_all_conditions(reference: Pipeline) -> None:
    requests = [{"prompts": PROMPTS[:2], "seed": 0}, {"prompts": PROMPTS[2:], "seed": 0}]
    found = compare(reference, reference, requests, conditions=PROMPTS)
    sides = reference.config.patch_nums
    assert [step.num_tokens for step in found.steps] == [3 * side**2 for side in sides]
    assert found.conditions == tuple(PROMPTS)


def test_a_shift_of_all_logits_is_an_error_without_divergence(
    reference: Pipeline, tiny_system: Any
) -> None:
    """Adding 0.5 to every logit changes no probability; guidance keeps a common shift."""
    contender = changed(reference, tiny_system, lambda s: s.predictor.head.bias.add_(0.5))
    for step in compare(reference, contender, REQUESTS).steps:
        assert step.max_abs_error == pytest.approx(0.5, abs=1e-4)
        assert step.mean_abs_error == pytest.approx(0.5, abs=1e-4)
        assert step.max_relative_error == pytest.approx(0.5 / step.logits_range, rel=1e-3)
        assert step.kl_max < 1e-9
        assert step.top1_agreement == 1
        assert step.latent_max_abs_error == 0  # the tokens are forced


def test_changed_weights_are_caught_and_every_flip_is_explained_by_its_error(
    reference: Pipeline, tiny_system: Any
) -> None:
    def change(system: Any) -> None:
        system.predictor.head.weight.mul_(1.1)

    found = compare(reference, changed(reference, tiny_system, change), REQUESTS)
    assert found.max_relative_error > 1e-4
    assert max(step.kl_mean for step in found.steps) > 0
    assert 0 < found.num_flips < 3 * reference.config.num_tokens
    assert len(found.flips) == min(found.num_flips, MAX_FLIPS)
    assert found.token_agreement < 1
    assert all(flip.expected != flip.drawn for flip in found.flips)
    assert all(flip.explained for flip in found.flips)
    assert found.first_divergent_step is not None
    assert found.free_psnr_db is not None
    assert found.forced_psnr_db is None  # decoder and codebook are the same


def test_a_flip_beyond_the_error_is_not_explained(
    reference: Pipeline, tiny_system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler that takes the next code has flips although all logits are equal."""
    contender = changed(reference, tiny_system, lambda s: None)
    run = contender.backend.run

    def next_code(stage: str, feeds: Any, outputs: Any = None) -> Any:
        results = run(stage, feeds, outputs)
        if stage == "select":
            results["tokens"] = (results["tokens"] + 1) % contender.config.vae.vocab_size
        return results

    monkeypatch.setattr(contender.backend, "run", next_code)
    found = compare(reference, contender, REQUESTS)
    assert found.max_relative_error == 0
    assert found.token_agreement == 0
    assert not any(flip.explained for flip in found.flips)


def test_a_wrong_decoder_shows_in_the_images_of_equal_tokens(
    reference: Pipeline, tiny_system: Any
) -> None:
    contender = changed(reference, tiny_system, lambda s: s.vae.decoder.conv_out.bias.add_(0.02))
    found = compare(reference, contender, REQUESTS)
    assert found.token_agreement == found.free_token_agreement == 1
    # [-1, 1] to [0, 1] halves the shift; some pixels are clamped.
    assert found.forced_psnr_db is not None
    assert found.forced_psnr_db >= -20 * np.log10(0.01) - 1e-3


def test_logits_that_are_not_finite_are_refused(reference: Pipeline, tiny_system: Any) -> None:
    contender = changed(
        reference, tiny_system, lambda s: s.predictor.head.bias[:1].fill_(float("nan"))
    )
    with pytest.raises(ParityError, match=r"1x1: .* not finite"):
        compare(reference, contender, REQUESTS)


def test_divergence_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.standard_normal((2, 3, 7)).astype(np.float32) for _ in range(2))
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert np.allclose(_kl(p, q), expected.numpy())


def test_psnr_of_a_known_error() -> None:
    image = np.zeros((1, 3, 4, 4), np.float32)
    assert psnr_db(image, image + np.float32(0.1)) == pytest.approx(20, abs=1e-4)
    assert psnr_db(image, image.copy()) is None


def test_parity_survives_json(reference: Pipeline) -> None:
    found = compare(reference, reference, REQUESTS)
    assert Parity.from_dict(found.to_dict()) == found
