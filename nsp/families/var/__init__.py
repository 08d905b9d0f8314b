"""The family `var`: next-scale prediction with a multi-scale residual VQVAE.

Source: Tian et al. 2024, arXiv:2404.02905, and github.com/FoundationVision/VAR.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nsp.families.var.config import SIZES, TextCondition, VarConfig, with_classes, with_condition
from nsp.families.var.loop import batch_key, cache, generate, given, loop_inputs
from nsp.families.var.peers import PUBLIC_VAR
from nsp.families.var.sampling import VarSampling
from nsp.families.var.stages import stages
from nsp.family.contract import Family, Kind, Learner, Stage
from nsp.family.order import Encoded, Given, Order, Step
from nsp.family.peer import Peer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.var.system import VarSystem
    from nsp.family.recipe import RunConfig
    from nsp.stage.arena import Array, KVShape
    from nsp.stage.backend import Backend


class Var(Family[VarConfig, VarSampling, "VarSystem"]):
    """VAR and similar models, with classes or prompts."""

    name: ClassVar[str] = "var"
    published: ClassVar[Mapping[str, str]] = {
        "tokenizer": "Weights of the image tokenizer.",
        "predictor": "Weights of the transformer.",
    }
    peers: ClassVar[Sequence[Peer]] = (PUBLIC_VAR,)
    config, sampling, sizes = VarConfig, VarSampling, SIZES

    def condition(self, config: VarConfig) -> Kind:
        """Return the kind of condition for a picture."""
        return "class" if config.text is None else "prompt"

    def grids(self, config: VarConfig) -> Sequence[tuple[int, int]]:
        """Return the grid of every scale."""
        return [(side, side) for side in config.patch_nums]

    def cache(self, config: VarConfig, rows: int, dtype: str) -> "KVShape":
        """Return the size of the key/value cache of one batch."""
        return cache(config, rows, dtype)

    def stages(self, config: VarConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order."""
        return stages(config, kv_layout, dtype)

    def given(self, config: VarConfig) -> Mapping[str, Given]:
        """Return what an order may carry: random numbers and tokens of all scales."""
        return given(config)

    def null_prompt(self, config: VarConfig, order: Order[VarSampling]) -> str | None:
        """Return an order's null prompt: its own, or "" where the null condition is that."""
        empty = config.text is not None and config.text.null == "empty_prompt"
        return "" if order.negative is None and empty else order.negative

    def batch_key(self, config: VarConfig, order: Order[VarSampling]) -> Hashable:
        """Return what decides shapes and control flow."""
        return batch_key(config, order)

    def inputs(
        self, config: VarConfig, orders: Sequence[Order[VarSampling]], text: Encoded | None
    ) -> "dict[str, NDArray[Any]]":
        """Return all that the loop takes from the host."""
        return loop_inputs(config, orders, text)

    def loop(
        self, backend: "Backend", config: VarConfig, inputs: "Mapping[str, Array]"
    ) -> Iterator[Step]:
        """Yield one Step per scale."""
        return generate(backend, config, inputs)

    def examples(
        self, config: VarConfig, sampling: VarSampling
    ) -> Sequence[Sequence[Order[VarSampling]]]:
        """Return batches of orders that together call every stage."""
        from nsp.families.var.examples import examples

        return examples(config, sampling)

    @property
    def recipes(self) -> "Mapping[str, Callable[..., RunConfig]]":
        """Named training runs."""
        from nsp.families.var.recipes import RECIPES

        return RECIPES

    def with_classes(self, config: VarConfig, names: Sequence[str]) -> VarConfig:
        """Return the configuration for pictures of these classes."""
        return with_classes(config, names)

    def class_names(self, config: VarConfig) -> Sequence[str]:
        """Return the names of a model's classes by their numbers."""
        return () if isinstance(config.condition, TextCondition) else config.condition.id2label

    def convert(
        self, files: Mapping[str, Path], config: Mapping[str, Any] | None, output_dir: Path
    ) -> None:
        """Write the checkpoint folder `output_dir` from the weights of FoundationVision/VAR."""
        from nsp.families.var.published import convert

        convert(**files, config=config, output_dir=output_dir)

    def adopt(self, config: VarConfig, trained: VarConfig) -> VarConfig:
        """Return `config` with the condition of the trained model."""
        return with_condition(config, trained.condition)

    @property
    def learner(self) -> "Learner[VarConfig, VarSampling, VarSystem]":
        """What needs torch."""
        from nsp.families.var.learn import VarLearner

        return VarLearner()
