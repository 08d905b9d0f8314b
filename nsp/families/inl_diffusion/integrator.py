"""Integrator neurons: a small dynamical system behind every block, in its three forms.

x and a velocity v, at first 0, take a few steps: v = α·v - β·(x - μ), then y = x + dt·g·v says how
x is refined, as much as a soft gate h lets through. Nothing ever halts: h weighs, and the number of
steps is fixed, so that the graph is static.

Axes: B rows, N patches, D width, E experts.
Source: github.com/Web3-League/inl-diffusion, inl_diffusion/models/inl_dit.py; "scalar" is the form
that its documentation describes (commit 9ef2a1a).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.families.inl_diffusion.config import DitConfig
from nsp.layers.applied import applied

_TIME_STEP = 0.1
_FIRST_WEIGHT = 0.1  # of the refinement in an untrained block
_EXPERT_WIDTH = 64

# The state (B, N, D) after the block, and the mean gate (B, N) of its steps.
Integrated: TypeAlias = tuple[Tensor, Tensor]
Moved: TypeAlias = tuple[Tensor, Tensor]  # y and the new velocity


def _two_layers(num_in: int, hidden: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_in, hidden), nn.GELU(), nn.Linear(hidden, num_out))


def _through(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Return two linear layers with a GELU between, in the dtype of their weights."""
    first, second = layers[0], layers[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    return applied(second, F.gelu(applied(first, x))).float()


class _Gated(nn.Module):
    """What all forms share: the gate and the refinement."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width, self.num_iterations = config.width, config.num_iterations
        self.halt_gate = _two_layers(width, width // 4, 1)
        self.refine = _two_layers(width, 2 * width, width)

    def _refined(self, y_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to x, before its weight, and the gate (B, N)."""
        gate = _through(self.halt_gate, y_BND).sigmoid()
        return gate * _through(self.refine, y_BND), gate[..., 0]


class ScalarIntegrator(_Gated):
    """Only refinement: x + w·h(x)·refine(x), with one number w."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        self.integration_weight = nn.Parameter(torch.full((1,), _FIRST_WEIGHT))

    def forward(self, x_BND: Tensor) -> Integrated:
        """Return the state and its gate."""
        gates = []
        for _ in range(self.num_iterations):
            added, gate = self._refined(x_BND)
            x_BND = x_BND + added * self.integration_weight
            gates.append(gate)
        return x_BND, _mean(gates)


class _Moving(_Gated):
    """The forms with a velocity; a subclass says where x and v move."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        self.mu = nn.Parameter(torch.zeros(config.width))
        self.integration_weight = nn.Parameter(torch.full((config.width,), _FIRST_WEIGHT))

    def _moved(self, controls: Tensor, x: Tensor, velocity: Tensor | None) -> Moved:
        """Return y and v for the three numbers per channel; no velocity is one of 0."""
        alpha, beta, gain = controls.chunk(3, -1)
        pull = F.softplus(beta) * (x - self.mu)
        velocity = -pull if velocity is None else alpha.sigmoid() * velocity - pull
        return x + _TIME_STEP * gain.sigmoid() * velocity, velocity

    def _integrated(
        self, x_BND: Tensor, move: Callable[[Tensor, Tensor | None], Moved]
    ) -> Integrated:
        gates, velocity = [], None
        for _ in range(self.num_iterations):
            y, velocity = move(x_BND, velocity)
            added, gate = self._refined(y)
            x_BND = x_BND + added * self.integration_weight
            gates.append(gate)
        return x_BND, _mean(gates)


class ControlledIntegrator(_Moving):
    """The velocity's three numbers per channel come from x and v by a controller."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        self.controller = _two_layers(2 * config.width, config.width // 2, 3 * config.width)

    def forward(self, x_BND: Tensor) -> Integrated:
        """Return the state and its gate."""
        return self._integrated(
            x_BND, lambda x, v: self._moved(_controls(self.controller, x, v), x, v)
        )


class MixtureIntegrator(_Moving):
    """Several controllers; a router picks a few for every patch, and one is always used.

    All experts are computed and weighed: their hidden layers are narrow, and the graph stays
    static.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        width, experts = config.width, config.num_experts
        self.num_active = config.num_active_experts
        self.router = _two_layers(width, width // 4, experts)
        self.shared_expert = _two_layers(2 * width, _EXPERT_WIDTH, 3 * width)
        self.shared_weight = nn.Parameter(torch.zeros(()))
        self.expert_w1 = nn.Parameter(torch.empty(experts, 2 * width, _EXPERT_WIDTH))
        self.expert_b1 = nn.Parameter(torch.zeros(experts, _EXPERT_WIDTH))
        self.expert_w2 = nn.Parameter(torch.empty(experts, _EXPERT_WIDTH, 3 * width))
        self.expert_b2 = nn.Parameter(torch.zeros(experts, 3 * width))

    def shares(self, x_BND: Tensor) -> Tensor:
        """Return the share (B, N, E) of every expert in a patch; 0 for those not picked."""
        chances = _through(self.router, x_BND).softmax(-1)
        picked, indices = chances.topk(self.num_active, -1)
        picked = picked / picked.sum(-1, keepdim=True)
        return torch.zeros_like(chances).scatter(-1, indices, picked)

    def forward(self, x_BND: Tensor) -> Integrated:
        """Return the state and its gate."""
        shares_EBN1 = self.shares(x_BND).movedim(-1, 0)[..., None]
        shared = self.shared_weight.sigmoid()

        def move(x: Tensor, v: Tensor | None) -> Moved:
            alone = self._moved(_controls(self.shared_expert, x, v), x, v)
            each = self._moved(self._by_experts(x, v), x, v)
            y, velocity = (
                shared * one + (1 - shared) * (shares_EBN1 * many).sum(0)
                for one, many in zip(alone, each, strict=True)
            )
            return y, velocity

        return self._integrated(x_BND, move)

    def _by_experts(self, x_BND: Tensor, velocity_BND: Tensor | None) -> Tensor:
        """Return the controls (E, B, N, 3D) of every expert, in float32."""
        weight_E2DH: Tensor = self.expert_w1
        dtype = weight_E2DH.dtype
        if velocity_BND is None:
            seen, weight_E2DH = x_BND, weight_E2DH[:, : x_BND.shape[-1]]
        else:
            seen = torch.cat([x_BND, velocity_BND], -1)
        hidden = seen.to(dtype)[None] @ weight_E2DH[:, None] + self.expert_b1[:, None, None]
        controls = F.gelu(hidden) @ self.expert_w2[:, None] + self.expert_b2[:, None, None]
        return controls.float()


def _controls(layers: nn.Sequential, x_BND: Tensor, velocity_BND: Tensor | None) -> Tensor:
    """Return the controls (B, N, 3D), in float32.

    Without a velocity only the half of the first weights that reads x is used.
    """
    if velocity_BND is not None:
        return _through(layers, torch.cat([x_BND, velocity_BND], -1))
    first, second = layers[0], layers[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    weight = first.weight[:, : x_BND.shape[-1]]
    hidden = F.gelu(F.linear(x_BND.to(weight.dtype), weight, first.bias))
    return applied(second, hidden).float()


def _mean(gates: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(gates)).mean(0)


INTEGRATORS: Mapping[str, Callable[[DitConfig], nn.Module]] = {
    "controlled": ControlledIntegrator,
    "scalar": ScalarIntegrator,
    "mixture": MixtureIntegrator,
}
