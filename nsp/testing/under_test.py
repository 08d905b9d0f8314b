"""The family under test and all that is made of it once: a small model, its engines, orders."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nsp.artifacts.systems import save_checkpoint
from nsp.data.sources import open_source
from nsp.errors import ConfigError, NspError
from nsp.export.options import ExportOptions
from nsp.export.run import export
from nsp.family.contract import AnyFamily, Stage
from nsp.family.order import Order, Sampling
from nsp.family.recipe import RunConfig
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from nsp.text.parts import TextEncoderSettings

_NOISE = 0.05  # added to every weight: fresh models have branches that weigh nothing
_NUM_PICTURES = 12


def _others(value: Any) -> Sequence[Any]:
    """Return other values that a setting may have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value + 2, value - 1]
    return [value * 0.7, value + 1.5] if isinstance(value, float) else []


class UnderTest:
    """A family on its size "tiny", with random weights of which each matters."""

    def __init__(self, family: AnyFamily, folder: Path, *, recipe: str | None = None) -> None:
        self.family, self.folder, self._recipe = family, folder, recipe
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def run(self) -> RunConfig:
        """The training run that is tried: the recipe asked for, or the one named after "smoke"."""
        recipes = self.family.recipes
        name = self._recipe or next((name for name in recipes if "smoke" in name), None)
        if name is None or name not in recipes:
            known = ", ".join(recipes)
            raise ConfigError(f"no recipe {name or 'named after smoke'} to try; known: {known}")
        return recipes[name]()

    @cached_property
    def config(self) -> Any:
        """The configuration of the small model."""
        if "tiny" not in self.family.sizes:
            raise AssertionError('sizes have no "tiny"')
        return self.system.config

    @cached_property
    def system(self) -> Any:
        """The small model, in float32 and evaluation mode."""
        torch.manual_seed(0)
        made = self.family.learner.new_system(
            self.family.sizes["tiny"],
            TextEncoderSettings.from_dict(self.run.text_encoder),
            open_source(self.pictures),
        )
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * _NOISE)
        return made.eval()

    @cached_property
    def pictures(self) -> Path:
        """A folder of small captioned pictures to train on."""
        folder = self.folder / "pictures"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for index in range(_NUM_PICTURES):
            pixels = np.full((16, 16, 3), rng.integers(0, 256, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(f"colour number {index}")
        return folder

    @cached_property
    def layout(self) -> str:
        """The cache layout that PyTorch runs."""
        return self.family.layout(["delta"])

    @cached_property
    def declared(self) -> Mapping[str, Stage]:
        """Its stages."""
        return self.family.stages(self.config, kv_layout=self.layout, dtype="float32")

    @cached_property
    def pipeline(self) -> Pipeline:
        """The small model in PyTorch."""
        return torch_pipeline(self.family, self.system, kv_layout=self.layout, device="cpu")

    @cached_property
    def orders(self) -> Sequence[Order[Sampling]]:
        """Orders that may share a batch, each with a seed of its own; at least two."""
        batches = self.family.examples(self.config, self.pipeline.sampling)
        most = max(batches, key=len)
        if len(most) < 2:
            most = [most[0], dataclasses.replace(most[0], seed=most[0].seed + 1)]
        return most[:3]

    @cached_property
    def mixed(self) -> Sequence[Order[Sampling]]:
        """Orders that may share a batch although each has another setting of its own.

        Every setting that is a number or a flag is tried with other values; those that the model
        refuses, or that decide the batch's shapes or steps, are left out.
        """
        first = self.orders[0]
        key, found = self.pipeline.check_order(first), [first]
        for name, value in first.sampling.to_dict().items():
            for other in _others(value):
                try:
                    changed = first.sampling.changed({name: other})
                    order = dataclasses.replace(first, sampling=changed, seed=len(found))
                    if self.pipeline.check_order(order) == key:
                        found.append(order)
                        break
                except NspError:  # not a value of this setting, or not of this model
                    continue
        return found

    @cached_property
    def checkpoint(self) -> Path:
        """The small model's checkpoint folder."""
        save_checkpoint(self.folder / "checkpoint", self.system, notes={"made_by": "nsp.testing"})
        return self.folder / "checkpoint"

    @cached_property
    def engines(self) -> Path:
        """Its engine folder for ONNX Runtime, in fp32 and fp16."""
        folder = self.folder / "engines"
        options = ExportOptions(
            checkpoint=str(self.checkpoint),
            engine_dir=str(folder),
            targets=("onnxruntime",),
            precisions=("fp32", "fp16"),
        )
        export(options)
        return folder
