"""The family `next_patch`: raster codes of an image, trained by next-patch prediction.

Source: LlamaGen (Sun et al. 2024, arXiv:2406.06525) and Next Patch Prediction (Pang et al. 2024,
arXiv:2412.15321), which changes the training alone.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nsp.families.next_patch.config import GPT_SIZES, SIZES, NextPatchConfig, with_classes
from nsp.families.next_patch.peers import PUBLIC_LLAMAGEN
from nsp.families.next_patch.stages import stages
from nsp.family.classes import ClassCondition
from nsp.family.contract import Kind, Learner, Pretrained, Stage
from nsp.family.order import Encoded, Order, Step
from nsp.family.peer import Peer
from nsp.raster import loop
from nsp.raster.examples import examples
from nsp.raster.sampling import RasterSampling
from nsp.raster.shared_family import RasterFamily

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nsp.families.next_patch.system import NextPatchSystem
    from nsp.family.recipe import RunConfig
    from nsp.stage.arena import Array
    from nsp.stage.backend import Backend


class NextPatch(RasterFamily[NextPatchConfig, "NextPatchSystem"]):
    """LlamaGen and models trained by next-patch prediction, with classes or captions."""

    name: ClassVar[str] = "next_patch"
    published: ClassVar[Mapping[str, str]] = {
        "tokenizer": "Weights of the image tokenizer.",
        "predictor": "Weights of the transformer.",
    }
    published_folders: ClassVar[Mapping[str, str]] = {
        "text-encoder": "T5 folder, for models of captions.",
    }
    pretrained: ClassVar[Sequence[Pretrained]] = (
        Pretrained(option="vq_ckpt", field="pretrained_vq", phase="tokenizer"),
        Pretrained(option="gpt_ckpt", field="pretrained_gpt", phase="predictor"),
    )
    peers: ClassVar[Sequence[Peer]] = (PUBLIC_LLAMAGEN,)
    config, sizes = NextPatchConfig, SIZES

    def condition(self, config: NextPatchConfig) -> Kind:
        """Return the kind of condition for a picture."""
        return "class" if config.caption is None else "prompt"

    def stages(self, config: NextPatchConfig, *, kv_layout: str, dtype: str) -> Mapping[str, Stage]:
        """Return every stage, in data-path order."""
        return stages(config, kv_layout, dtype)

    def inputs(
        self,
        config: NextPatchConfig,
        orders: Sequence[Order[RasterSampling]],
        text: Encoded | None,
    ) -> "dict[str, NDArray[Any]]":
        """Return all that the loop takes from the host.

        The learned null condition has the padding of its image's prompt; without one it has none,
        and needs no text encoder.
        """
        found = loop.loop_inputs(config.grid, orders)
        rows, batch = found["rows"], len(orders)
        if config.caption is None:
            ids = np.array([order.condition for order in orders], np.int64)
            classes = np.concatenate([ids, np.full_like(ids, config.num_classes)])[: len(rows)]
            return {**found, "token": config.vq.codebook_size + classes}
        found |= loop.prompt_inputs(
            orders,
            text,
            num_rows=len(rows),
            num_tokens=config.caption.max_tokens,
            width=config.caption.text_width,
        )
        padding = np.zeros(batch, np.int64) if text is None else (text.mask == 0).sum(1)
        has_prompt = np.array([order.condition is not None for order in orders])
        of_image = np.where(has_prompt, padding[:batch], 0)[rows]
        prompts, num_prompts = found["prompts"], len(padding)
        of_prompt = padding[np.minimum(prompts, num_prompts - 1)]
        return {**found, "first": np.where(prompts < num_prompts, of_prompt, of_image)}

    def loop(
        self, backend: "Backend", config: NextPatchConfig, inputs: "Mapping[str, Array]"
    ) -> Iterator[Step]:
        """Yield one Step per row of codes."""
        if config.caption is None:
            return loop.draw_codes(backend, config.grid, inputs, carried={})
        prefix = {name: inputs[name] for name in ("text_states", "prompts", "first")}
        carried = {"first": inputs["first"]}
        return loop.draw_codes(backend, config.grid, inputs, carried=carried, prefix=prefix)

    def examples(
        self, config: NextPatchConfig, sampling: RasterSampling
    ) -> Sequence[Sequence[Order[RasterSampling]]]:
        """Return batches of orders that together call every stage."""
        classes = config.num_classes if isinstance(config.condition, ClassCondition) else None
        return examples(config.grid, sampling, num_classes=classes)

    @property
    def recipes(self) -> "Mapping[str, Callable[..., RunConfig]]":
        """Named training runs."""
        from nsp.families.next_patch.recipes import RECIPES

        return RECIPES

    def with_classes(self, config: NextPatchConfig, names: Sequence[str]) -> NextPatchConfig:
        """Return `config` for pictures of these classes."""
        return with_classes(config, names)

    def class_names(self, config: NextPatchConfig) -> Sequence[str]:
        """Return the names of a model's classes by their numbers; empty if it has none."""
        condition = config.condition
        return condition.id2label if isinstance(condition, ClassCondition) else ()

    def sample_name(
        self,
        config: NextPatchConfig,
        sampling: RasterSampling,
        *,
        model: str,
        size_px: int,
        size_eval_px: int,
        seed: int,
    ) -> str:
        """Return the name that the public code gives to an archive of pictures.

        An interval of guidance, which it leaves out, is added. Source: LlamaGen,
        autoregressive/sample/sample_c2i_ddp.py.
        """
        gpt, chosen = config.gpt, sampling
        sizes = {size: name for name, size in GPT_SIZES.items()}
        size = sizes.get((gpt.depth, gpt.width, gpt.num_heads), f"{gpt.depth}x{gpt.width}")
        interval = "" if chosen.cfg_interval < 0 else f"interval-{chosen.cfg_interval}-"
        return (
            f"GPT-{size}-{model}-size-{size_px}-size-{size_eval_px}-VQ-{config.vq.downsampling}-"
            f"topk-{chosen.top_k}-topp-{chosen.top_p}-temperature-{chosen.temperature}-"
            f"cfg-{chosen.guidance_scale}-{interval}seed-{seed}"
        )

    def convert(
        self, files: Mapping[str, Path], config: Mapping[str, Any] | None, output_dir: Path
    ) -> None:
        """Write the checkpoint folder `output_dir` from the weights of LlamaGen."""
        from nsp.families.next_patch.published import convert

        parts = {name.replace("-", "_"): path for name, path in files.items()}
        convert(**parts, config=config, output_dir=output_dir)

    def adopt(self, config: NextPatchConfig, trained: NextPatchConfig) -> NextPatchConfig:
        """Return `config` with the condition of the trained model."""
        return dataclasses.replace(
            config, condition=trained.condition, pretrained_vq=None, pretrained_gpt=None
        )

    @property
    def learner(self) -> "Learner[NextPatchConfig, RasterSampling, NextPatchSystem]":
        """The part that needs torch."""
        from nsp.families.next_patch.learn import NextPatchLearner

        return NextPatchLearner()
