"""What is counted at export: the operations and bytes that a call of a stage really takes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.costs import (
    SpanCosts,
    StageCosts,
    arena_bytes,
    call_cost,
    read_costs,
)
from nsp.artifacts.counting import count_costs, counting, operation_counter
from nsp.artifacts.manifest import read_manifest
from nsp.artifacts.weight_kinds import WeightCounts
from nsp.errors import ConfigError
from nsp.families.var.config import SIZES, VarConfig
from nsp.families.var.system import VarSystem
from nsp.family.classes import ClassCondition
from nsp.family.contract import Stage
from nsp.family.registry import family
from nsp.family.system import System
from nsp.stage.io import Axes, Sizes, StageIO, sample_arrays
from tests.artifacts.engine_folders import CLASSES, write_engines
from tests.artifacts.hand_counts import TextEncoderSize, Work, var_work
from tests.families.next_scale.models import new_tiny_system

ROWS = {"B": 3, "G": 6, "N": 5, "R": 1}
TEXT_ENCODER = TextEncoderSize(depth=1, hidden_width=64)


@pytest.fixture(scope="module")
def text_model(tiny_checkpoint: Path) -> VarSystem:
    """The tiny model of `var` that reads prompts."""
    found: VarSystem = read_checkpoint(tiny_checkpoint).load()
    return found


def sizes_of(stage: Stage) -> list[Sizes]:
    """Return a call's sizes at every span."""
    largest = [
        {axis: size if isinstance(size, int) else size[1] for axis, size in span.items()}
        for span in stage.spans
    ]
    return [{**ROWS, **span} for span in largest]


def assert_as_by_hand(system: VarSystem) -> None:
    """Fail where a stage's operations are not those of the arithmetic."""
    counted = count_costs(family("var"), system)
    stages = family("var").stages(system.config, kv_layout="delta", dtype="float32")
    assert counted.keys() == stages.keys()
    ours, by_hand = {}, {}
    for name, stage in stages.items():
        for number, sizes in enumerate(sizes_of(stage)):
            work = var_work(system.config, name, sizes, TEXT_ENCODER)
            by_hand[name, number] = None if work is None else work.flops
            ours[name, number] = counted[name].flop(sizes)
    assert ours == by_hand


def test_operations_of_a_text_model_are_those_counted_by_hand(text_model: VarSystem) -> None:
    assert_as_by_hand(text_model)


@pytest.mark.parametrize(
    "vae", [{}, {"share_quant_resi": 0, "quant_conv_kernel": 1}, {"quant_resi": 0.0}]
)
@pytest.mark.parametrize("predictor", [{"shared_aln": True, "mlp_ratio": 2.5}])
def test_operations_of_class_models_are_those_counted_by_hand(
    vae: dict[str, Any], predictor: dict[str, Any]
) -> None:
    tiny = SIZES["tiny"]
    config = VarConfig(
        patch_nums=(1, 2, 4),
        vae=dataclasses.replace(tiny.vae, patch_size=2, num_res_blocks=2, **vae),
        predictor=dataclasses.replace(tiny.predictor, **predictor),
        condition=ClassCondition(num_classes=5),
    )
    assert_as_by_hand(VarSystem(config).eval())


def counted_while_running(module: torch.nn.Module, stage: Stage, sizes: Sizes) -> int:
    """Return torch's count of a real call, attention as two products."""
    tensors = [torch.from_numpy(array) for array in sample_arrays(stage.io, sizes).values()]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*tensors)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["var", "next_scale"])
def test_operations_are_so_many_for_each_row_and_those_of_real_calls(
    name: str, text_model: VarSystem
) -> None:
    system: System[Any] = text_model if name == "var" else new_tiny_system()
    owner = family(name)
    counted = count_costs(owner, system)
    modules = owner.learner.modules(system, "delta")
    for stage_name, stage in owner.stages(
        system.config, kv_layout="delta", dtype="float32"
    ).items():
        for rows in (ROWS, {"B": 1, "G": 2, "N": 1, "R": 3}):
            sizes = {**sizes_of(stage)[-1], **rows}
            expected = counted_while_running(modules[stage_name], stage, sizes)
            assert counted[stage_name].flop(sizes) == expected, stage_name


def test_attention_counts_the_same_in_both_layouts_of_the_cache(text_model: VarSystem) -> None:
    """PyTorch counts neither ONNX's operator nor the fused one of CPUs: both would be nothing."""
    found = {}
    for layout in ("delta", "present"):
        stage = family("var").stages(text_model.config, kv_layout=layout, dtype="float32")["step"]
        module = family("var").learner.modules(text_model, layout)["step"]
        with counting() as counter:
            found[layout] = counter.flop(module, stage.io, sizes_of(stage)[-1])
    assert found["delta"] == found["present"]


def test_the_fused_attention_of_cpus_is_counted() -> None:
    q, k = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as unaware:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    with torch.no_grad(), operation_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 5 * 7 * 8)
    assert unaware.get_total_flops() == 0  # or else the formula here is not needed any more


def test_a_published_size_needs_the_operations_it_is_known_to_need() -> None:
    """VAR d16, batch 1 with guidance: 0.60 TFLOP in ten scales, its decoder 0.394 TFLOP."""
    config = SIZES["d16"]
    work, past = Work(), 0
    for side in config.patch_nums:
        step = var_work(config, "step", {"G": 2, "L": side**2, "P": past})
        assert step is not None
        work, past = work + step, past + side**2
    decoder = var_work(config, "decoder", {"B": 1})
    assert decoder is not None
    assert work.flops == pytest.approx(0.60e12, rel=0.05)
    assert decoder.flops == pytest.approx(0.394e12, rel=0.02)


def test_between_the_counted_sizes_operations_are_interpolated_exactly() -> None:
    def attention(new: int, past: int) -> int:
        return 7 * new + 4 * new * (past + new)

    new, past = (1, 5, 9), (0, 8)
    span = SpanCosts(
        axes={"L": new, "P": past},
        flop={"": (3,) * 6, "G": tuple(attention(n, p) for n in new for p in past)},
    )
    costs = StageCosts(weights=WeightCounts(), tables=WeightCounts(), spans=(span,))
    assert costs.flop({"G": 2, "L": 4, "P": 3}) == 3 + 2 * attention(4, 3)
    assert costs.flop({"G": 2, "L": 10, "P": 3}) is None
    with pytest.raises(ConfigError, match="needs 6 numbers"):
        SpanCosts(axes=span.axes, flop={"G": (1, 2)})


def test_a_call_moves_its_tensors_and_all_weights_but_tables(text_model: VarSystem) -> None:
    counted = count_costs(family("var"), text_model)
    stages = family("var").stages_io(text_model.config, kv_layout="delta", dtype="float32")
    encoder = counted["text_encoder"]
    assert text_model.text_encoder is not None
    embedded = text_model.text_encoder.embeddings
    tables = [embedded.token_embedding.weight, embedded.position_embedding.weight]
    assert encoder.tables.full == sum(table.numel() for table in tables)
    assert encoder.read_bytes("fp32") == 4 * (encoder.weights.full - encoder.tables.full)
    step, sizes = counted["step"], {"G": 2, "L": 4, "P": 1}
    cost = call_cost(step, stages["step"], sizes, "fp16")
    assert cost is not None
    shapes = [*stages["step"].input_shapes(sizes).values()]
    shapes += stages["step"].output_shapes(sizes).values()
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    positions = sizes["L"]
    assert cost.io_bytes == 4 * numbers + 4 * positions  # positions are int64
    assert cost.num_bytes == cost.io_bytes + step.read_bytes("fp16")
    assert call_cost(step, stages["step"], {**sizes, "L": 5}, "fp16") is None


def test_scratch_holds_the_logits_that_a_draw_sorts_and_the_arena_every_buffer(
    text_model: VarSystem,
) -> None:
    config = text_model.config
    counted = count_costs(family("var"), text_model)
    least = 4 * config.patch_nums[-1] ** 2 * config.vae.vocab_size
    assert least <= counted["select"].scratch < 12 * least
    shape = family("var").cache(config, 2, "bfloat16")
    assert shape is not None
    numbers = 2 * shape.num_layers * shape.num_tokens * 2 * shape.num_heads * shape.head_width
    assert arena_bytes("delta", shape) == 2 * numbers
    assert arena_bytes("present", shape) == 4 * numbers  # past and present take turns


def test_weights_are_as_wide_as_an_export_makes_them() -> None:
    counts = WeightCounts(half=1, int8=10, full=100)
    found = {name: counts.num_bytes(name) for name in ("fp32", "fp16", "bf16", "int8")}
    assert found == {"fp32": 444, "fp16": 422, "bf16": 422, "int8": 414}


def test_a_folder_from_before_costs_were_counted_is_read(tmp_path: Path) -> None:
    write_engines(tmp_path, CLASSES)
    assert read_costs(read_manifest(tmp_path)) == {}


def test_counting_changes_no_weight(text_model: VarSystem) -> None:
    before: Mapping[str, torch.Tensor] = {
        name: tensor.clone() for name, tensor in text_model.state_dict().items()
    }
    count_costs(family("var"), text_model)
    assert all(torch.equal(before[n], t) for n, t in text_model.state_dict().items())


def test_a_cache_that_is_handed_over_whole_counts_with_half_of_it() -> None:
    span = SpanCosts(axes={"P": (0, 5, 10)}, flop={"G": (1, 6, 11)})
    costs = StageCosts(weights=WeightCounts(), tables=WeightCounts(), spans=(span,))
    whole = {"past_k_0": Axes("G 2 10 4")}
    io = StageIO({"x": Axes("G"), **whole}, {"new_k_0": whole["past_k_0"]})
    cost = call_cost(costs, io, {"G": 3}, "fp32")
    assert cost is not None
    assert cost.flop == 3 * 6
    assert cost.io_bytes == 4 * (3 + 3 * 2 * 10 * 4 // 2)
