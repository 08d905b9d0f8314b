"""The family `raster`: 256 pixels drawn one after the other, each from all those before it.

Here is what nsp knows of it without torch; learn.py has the network. There is no cache: every step
reads the whole canvas (B, 1, h, w), which holds the ink of every pixel, in [0, 1].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.config import ModelConfig
from nsp.errors import ConfigError
from nsp.family.contract import Family, Kind, Learner, Stage
from nsp.family.gate import Psnr, Tokens
from nsp.family.order import Order, Sampling, Step, stream
from nsp.family.recipe import OptimizerConfig, PhaseConfig, RunConfig
from nsp.stage.arena import Array
from nsp.stage.backend import Backend
from nsp.stage.io import Axes, StageIO

if TYPE_CHECKING:
    from raster_family.learn import RasterSystem

Orders: TypeAlias = "Sequence[Order[RasterSampling]]"


@dataclass(frozen=True, kw_only=True)
class RasterConfig(ModelConfig):
    """Sizes of one model."""

    image_size_px: int = 16
    num_levels: int = 16  # of ink; level 0 is white paper
    width: int  # channels of the network
    depth: int  # its layers between the first and the last


SIZES = {"tiny": RasterConfig(width=8, depth=1), "small": RasterConfig(width=48, depth=3)}


@dataclass(frozen=True, kw_only=True)
class RasterSampling(Sampling):
    """Settings of one image; each is an option of `nsp generate`."""

    temperature: float = field(default=1.0, metadata={"help": "Divides the logits."})
    ink_bias: float = field(default=0.0, metadata={"help": "Above 0 draws darker, below lighter."})

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (1e-3 <= self.temperature <= 1e3 and abs(self.ink_bias) <= 1e3):
            raise ConfigError("temperature must be in [0.001, 1000], ink_bias in [-1000, 1000]")


def run(
    width: Annotated[int, "Channels of the network."] = 48, steps: int = 3000, batch_size: int = 32
) -> RunConfig:
    """Return a run on the embedded set, whose pictures become grey; `--width` is its option."""
    optimizer = OptimizerConfig(lr=2e-3, schedule="cos", warmup_steps=1)
    phase = PhaseConfig(name="pixels", steps=steps, batch_size=batch_size, optimizer=optimizer)
    model = replace(SIZES["small"], width=width)
    return RunConfig(family="raster", model=model.to_dict(), phases=(phase,))


class Raster(Family[RasterConfig, RasterSampling, "RasterSystem"]):
    """A small causal network that is asked once per pixel."""

    name: ClassVar[str] = "raster"
    config, sampling, sizes = RasterConfig, RasterSampling, SIZES
    recipes: ClassVar = {"raster": run, "raster_smoke": partial(run, 8, 2, 4)}

    def condition(self, config: RasterConfig) -> Kind:
        """Return what a picture is requested with: nothing."""
        return "none"

    def grids(self, config: RasterConfig) -> Sequence[tuple[int, int]]:
        """Return the one grid there is."""
        return [(config.image_size_px, config.image_size_px)]

    def stages(self, config: RasterConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage: ask for one pixel, draw its level of ink, show the canvas."""
        side = config.image_size_px
        canvas, logits = Axes(f"B 1 {side} {side}"), Axes(f"B 1 {config.num_levels}")
        state = {"canvas": canvas, "position": Axes("1", "int64")}
        draw = {"uniforms": Axes("B 1"), "temperature": Axes("B"), "ink_bias": Axes("B")}
        drawn = {"new_canvas": canvas, "tokens": Axes("B 1", "int64"), "guided": logits}
        step = StageIO(state, {"logits": logits})
        select = StageIO({**state, "logits": logits, **draw}, drawn)
        decoder = StageIO({"latent": canvas}, {"image": Axes(f"B 3 {side} {side}")})
        return {
            "step": Stage(io=step, half=("net.*",), gate=Tokens("logits", drawn_by=("select",))),
            "select": Stage(io=select),
            "decoder": Stage(io=decoder, gate=Psnr("image")),
        }

    def inputs(self, config: RasterConfig, orders: Orders, text: object) -> dict[str, NDArray[Any]]:
        """Return all that the loop takes from the host; `uniforms` (L, B) has a row per step."""
        side, count = config.image_size_px, config.image_size_px**2
        uniforms = [stream(order.seed).random(count, np.float32) for order in orders]
        return {
            "canvas": np.zeros((len(orders), 1, side, side), np.float32),
            "position": np.arange(count),
            "uniforms": np.stack(uniforms, axis=1),
            "temperature": np.array([o.sampling.temperature for o in orders], np.float32),
            "ink_bias": np.array([o.sampling.ink_bias for o in orders], np.float32),
        }

    def loop(
        self, backend: Backend, config: RasterConfig, inputs: Mapping[str, Array]
    ) -> Iterator[Step]:
        """Yield one Step per pixel; it can be shown where a row of pixels is complete."""
        settings = {name: inputs[name] for name in ("temperature", "ink_bias")}
        canvas, (total, batch) = inputs["canvas"], inputs["uniforms"].shape
        for index in range(total):
            state = {"canvas": canvas, "position": inputs["position"][index : index + 1]}
            uniforms = inputs["uniforms"][index : index + 1].reshape((batch, 1))
            logits = backend.run("step", state)
            made = backend.run("select", {**state, **logits, "uniforms": uniforms, **settings})
            canvas, is_row_end = made["new_canvas"], (index + 1) % config.image_size_px == 0
            drawn = {"tokens": (made["tokens"],), "logits": (made["guided"],)}
            yield Step(index, total, "tokens", canvas if is_row_end else None, drawn)

    def examples(self, config: RasterConfig, sampling: RasterSampling) -> Sequence[Orders]:
        """Return what every export is proved with: an image alone, and two of unlike settings."""
        dark = replace(sampling, ink_bias=1.0, temperature=0.5)
        return [[Order(None, 0, sampling)], [Order(None, 1, sampling), Order(None, 2, dark)]]

    @property
    def learner(self) -> "Learner[RasterConfig, RasterSampling, RasterSystem]":
        """What needs torch."""
        from raster_family.learn import RasterLearner

        return RasterLearner()
