"""Training runs of the family `next_patch`."""

from collections.abc import Callable, Mapping

from nsp.families.next_patch.config import SIZES
from nsp.family.recipe import OptimizerConfig, PhaseConfig, RunConfig


def smoke() -> RunConfig:
    """Return a run of seconds, for tests: the tiny model, two phases of four steps."""
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=1)
    phases = tuple(
        PhaseConfig(
            name=name,
            steps=4,
            batch_size=8,
            optimizer=optimizer,
            checkpoint_every=2,
            sample_every=2,
            log_every=1,
        )
        for name in ("tokenizer", "predictor")
    )
    return RunConfig(
        family="next_patch",
        model=SIZES["tiny"].to_dict(),
        phases=phases,
        anyway=True,  # four steps teach nothing
    )


RECIPES: Mapping[str, Callable[..., RunConfig]] = {"next_patch_smoke": smoke}
