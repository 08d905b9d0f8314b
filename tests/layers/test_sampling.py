"""What drawing promises: an image gets what its own settings ask for, whoever shares its batch."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsp.family.code_sampling import rank_bucket
from nsp.layers.logits import (
    apply_guidance,
    filter_by_mass,
    filter_by_rank,
    sample_by_inverse_cdf,
)

LENGTH, CODES = 6, 50
KINDS = ("normal", "peaked", "flat", "tied", "wide")


@dataclass(frozen=True)
class Settings:
    """Those of one image."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def ranks(self) -> int:
        return CODES if self.top_p < 1 and not self.top_k else rank_bucket(self.top_k, CODES)


SETTINGS = st.builds(
    Settings,
    guidance=st.sampled_from([1.0, 1.0, 0.0, 0.5, 2.5, 7.0]),
    temperature=st.sampled_from([1.0, 0.3, 1.7]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.99]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 32, 49, 50]),
)


def draw_logits(
    kind: str, seed: int, rows: int, length: int = LENGTH, codes: int = CODES
) -> Tensor:
    noise = torch.randn((rows, length, codes), generator=torch.Generator().manual_seed(seed))
    return {
        "normal": noise,
        "peaked": 8 * noise,
        "flat": 1e-3 * noise,
        "tied": (2 * noise).round(),
        "wide": 60 * noise,
    }[kind]


def column(values: list[Settings], name: str) -> Tensor:
    return torch.tensor([getattr(each, name) for each in values])


def filtered(logits_GLV: Tensor, rows: list[Settings]) -> Tensor:
    """Return what is kept of guided, scaled logits, at as many ranks as the rows need."""
    guided = apply_guidance(logits_GLV, column(rows, "guidance"))
    scaled = guided / column(rows, "temperature").reshape(-1, 1, 1)
    ranks = torch.arange(max(each.ranks for each in rows))
    return filter_by_rank(scaled, column(rows, "top_p"), column(rows, "top_k"), ranks)


def scalar_filter(x_BLV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return the filtered logits as one setting for the whole batch gave them before."""
    ranked = x_BLV.topk(top_k or (CODES if top_p < 1 else 1), dim=-1).values
    in_top_k = x_BLV >= ranked[..., -1:]
    total = torch.where(in_top_k, (x_BLV - ranked[..., :1]).exp(), 0.0).sum(-1, keepdim=True)
    share = (ranked - ranked[..., :1]).exp() / total
    above = share.cumsum(-1) - share
    threshold = torch.where((above < top_p) | (top_p >= 1), ranked, torch.inf).amin(-1, True)
    everything = top_p >= 1 and not top_k
    return torch.where((x_BLV >= threshold) | everything, x_BLV, -torch.inf)


@given(st.lists(SETTINGS, min_size=1, max_size=5), st.sampled_from(KINDS), st.integers(0, 99))
def test_a_row_among_others_keeps_and_draws_what_it_does_alone(
    rows: list[Settings], kind: str, seed: int
) -> None:
    logits = draw_logits(kind, seed, 2 * len(rows))
    uniforms = torch.rand((len(rows), LENGTH), generator=torch.Generator().manual_seed(seed))
    mixed = filtered(logits, rows)
    tokens = sample_by_inverse_cdf(mixed, uniforms)
    for i, own in enumerate(rows):
        # Alone, an image without guidance has no null row.
        needed = [i] if own.guidance == 1 else [i, len(rows) + i]
        alone = filtered(logits[needed], [own])
        assert torch.equal(mixed[i : i + 1], alone)
        assert torch.equal(tokens[i : i + 1], sample_by_inverse_cdf(alone, uniforms[i : i + 1]))


@given(SETTINGS, st.sampled_from(KINDS), st.integers(0, 99))
def test_one_setting_for_all_rows_keeps_what_the_scalar_form_kept(
    own: Settings, kind: str, seed: int
) -> None:
    scaled = draw_logits(kind, seed, 3) / own.temperature
    found = filter_by_rank(
        scaled,
        torch.full((3,), own.top_p),
        torch.full((3,), own.top_k),
        torch.arange(own.ranks),
    )
    assert torch.equal(found, scalar_filter(scaled, own.top_p, own.top_k))


def test_guidance_1_is_the_conditional_row_whatever_the_others_ask_for() -> None:
    logits = draw_logits("peaked", 0, 6)
    logits[3] = torch.inf  # a null row that would spoil any sum
    guided = apply_guidance(logits, torch.tensor([1.0, 3.0, 1.0]))
    assert torch.equal(guided[[0, 2]], logits[[0, 2]])
    assert torch.equal(guided[1], logits[4] + 3.0 * (logits[1] - logits[4]))


def test_guidance_steers_tensors_of_any_rank() -> None:
    latent_GChw = torch.randn((4, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    guided = apply_guidance(latent_GChw, torch.tensor([2.0, 1.0]))
    assert torch.equal(guided[0], latent_GChw[2] + 2.0 * (latent_GChw[0] - latent_GChw[2]))
    assert torch.equal(guided[1], latent_GChw[1])


@pytest.mark.parametrize("kind", KINDS)
def test_without_sorting_top_p_keeps_the_same_but_for_what_lies_on_the_edge(kind: str) -> None:
    choices = [
        Settings(top_p=p, top_k=k)
        for p in (1e-6, 0.05, 0.5, 0.9, 0.99, 0.9999, 1.0)
        for k in (0, 1, 40, 900)
    ]
    top_p, top_k = column(choices, "top_p"), column(choices, "top_k")
    logits = draw_logits(kind, 1, len(choices), 16, 4096)
    uniforms = torch.rand((len(choices), 16), generator=torch.Generator().manual_seed(1))
    ranked = filter_by_rank(logits, top_p, top_k, torch.arange(4096))
    halved = filter_by_mass(logits, top_p, top_k, torch.arange(1024))
    differs = ranked != halved
    same = ~differs.any(-1)
    tokens, others = (sample_by_inverse_cdf(each, uniforms) for each in (ranked, halved))
    assert torch.equal(tokens[same], others[same])
    # The two add the same numbers in another order, and halving ends at a width of 104 / 2^26: a
    # difference is an entry that has the mass p above it, but for rounding and entries that close.
    assert (~same).float().mean() < 0.01
    for row, place, code in differs.nonzero().tolist():
        own = choices[row]
        x_V = logits[row, place].double()
        in_top_k_V = x_V >= x_V.topk(own.top_k or 4096).values[-1]
        mass_V = torch.where(in_top_k_V, (x_V - x_V.max()).exp(), 0.0)
        least, most = (
            float(mass_V[x_V > x_V[code] + distance].sum() / mass_V.sum())
            for distance in (2e-6, -2e-6)
        )
        assert least - 1e-6 < own.top_p < most + 1e-6, (own, least, most)
