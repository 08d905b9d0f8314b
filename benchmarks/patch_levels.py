"""What an epoch costs with levels of patches: counted operations of raster models, no training.

The model is built without memory (torch's meta device), and one picture's forward and backward pass
is counted for every size of patches. What epochs of a run have which size is what training asks
(`PredictorSettings.level_at`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nsp.artifacts.counting import operation_counter
from nsp.errors import ConfigError
from nsp.family.registry import family
from nsp.raster.patches import patch_loss
from nsp.raster.predictor_phase import PredictorSettings
from nsp.raster.raster_system import RasterSystem
from nsp.values import choice


@dataclass(frozen=True, kw_only=True)
class LevelCost:
    """The cost of a run with so many levels."""

    patch_level: int
    sides: Mapping[int, int]  # side of patches -> epochs
    relative: float  # operations of the run over those of one that learns codes alone
    of_tokens: float  # the same if the cost were that of the number of patches


def flop_per_picture(family_name: str, size: str, sides: Sequence[int]) -> dict[int, int]:
    """Return the operations of a picture's forward and backward pass for every side of patches.

    Raises ConfigError for a model that does not draw codes in raster order, or reads captions.
    """
    owner = family(family_name)
    config = owner.sizes[choice(f"size of family {family_name}", size, owner.sizes)]
    if owner.condition(config) == "prompt":
        raise ConfigError(f"size {size} reads captions, which would count too; give one of classes")
    found = {}
    with torch.device("meta"):
        system = owner.learner.build(config, text_encoder=None, prompt_tokenizer=None)
        if not isinstance(system, RasterSystem):
            raise ConfigError(f"family {family_name} does not draw codes in raster order")
        grid = system.config.grid
        for side in sides:
            if grid.side % side:
                raise ConfigError(f"patches {side} codes wide do not fill a grid of {grid.side}")
            codes = torch.zeros(1, grid.length, dtype=torch.int64)
            condition, free = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
            with operation_counter() as counter:
                logits = system.logits(condition, free, codes, side)
                patch_loss(logits, codes, grid.side, side).mean().backward()
            found[side] = int(counter.get_total_flops())
    return found


def costs(
    flop: Mapping[int, int], *, levels: Sequence[int], epochs: int, epoch_rate: float
) -> list[LevelCost]:
    """Return the cost of a run of `epochs` for every number of levels."""
    made = []
    for level in levels:
        settings = PredictorSettings(patch_level=level, epoch_rate=epoch_rate)
        sides = [settings.level_at(epoch, epochs).side for epoch in range(epochs)]
        made.append(
            LevelCost(
                patch_level=level,
                sides={side: sides.count(side) for side in sorted(set(sides), reverse=True)},
                relative=sum(flop[side] for side in sides) / (epochs * flop[1]),
                of_tokens=sum(side**-2 for side in sides) / epochs,
            )
        )
    return made
