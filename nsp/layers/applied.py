"""Layers in the dtype of their weights: one rule of precision for stages of mixed types."""

from torch import Tensor, nn


def applied(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Return the layer's result, with `x` cast to the dtype of its weights."""
    result: Tensor = layer(x.to(layer.weight.dtype))
    return result
