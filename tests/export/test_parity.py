"""What the parity gates promise: wrong graphs fail, figures say how right the others are."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from nsp.backends.onnxruntime.ort_backend import CPU, OnnxRuntimeBackend
from nsp.backends.torch import TorchBackend
from nsp.errors import ParityError
from nsp.export.options import ExportOptions
from nsp.export.plan import make_plan
from nsp.export.proof.flips import Flip, compare_tokens, redrawn
from nsp.export.proof.gates import LIMITS, psnr_db
from nsp.export.proof.parity import Subject, check_stage
from nsp.export.proof.reference import Reference, record_reference
from nsp.export.run import export as run_export
from nsp.export.store import EngineStore
from nsp.family.contract import Stage
from nsp.family.registry import family
from nsp.layers.attention import attend_delta
from nsp.stage.backend import Backend


@pytest.fixture(scope="module")
def reference(small_checkpoint, system, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "engines"
    options = ExportOptions(
        checkpoint=str(small_checkpoint), engine_dir=str(folder), targets=("onnxruntime",)
    )
    return record_reference(make_plan(options, EngineStore(folder)), system)


def torch_subject(system, stage: str, precision: str = "fp32") -> Subject:
    """Return a stage of `system` in PyTorch as the one under test."""
    var = family("var")
    declared = var.stages(system.config, kv_layout="delta", dtype="float32")
    io = {name: each.io for name, each in declared.items()}
    backend = TorchBackend(var.learner.modules(system, "delta"), io, device="cpu")
    return subject(declared[stage], stage, backend, precision)


def subject(declared: Stage, stage: str, backend: Backend, precision: str) -> Subject:
    return Subject(
        stage=stage,
        io=declared.io,
        gate=declared.gate,
        backend=backend,
        precision=precision,
        label=stage,
    )


def held(subject: Subject, reference: Reference) -> dict[str, Any]:
    """Hold a stage to the reference, tokens included."""
    return check_stage(subject, reference.recordings, reference.pipeline.backend)


def onnx_subject(half_engines, stage: str, precision: str, path: Path | None = None) -> Subject:
    folder, manifest = half_engines
    variant = next(v for v in manifest.stages[stage] if v.precision == precision)
    io = {stage: variant.stage_io}
    files = {stage: path or folder / next(iter(variant.files))}
    backend = OnnxRuntimeBackend(files, io, kv_layout=variant.kv_layout, providers=[CPU])
    declared = family("var").stages(manifest.model_config, kv_layout="delta", dtype="float32")
    made = subject(declared[stage], stage, backend, precision)
    return replace(made, io=io[stage], label=f"{stage} here")


def test_the_reference_calls_every_stage_with_and_without_guidance(reference, half_engines):
    calls = [call for each in reference.recordings for call in each.calls]
    assert {call.stage for call in calls} == set(half_engines[1].stages)
    ratios = {
        len(call.feeds["logits"]) / len(call.feeds["uniforms"])
        for call in calls
        if call.stage.startswith("select")
    }
    assert ratios == {1.0, 2.0}


def test_pytorch_itself_passes_without_error(reference, system):
    for stage in ("text_encoder", "condition", "step", "select_smooth", "accumulate", "decoder"):
        figures = held(torch_subject(system, stage), reference)
        assert all(o["max_abs"] < 1e-6 for o in figures["outputs"].values()), stage


def test_the_figures_of_every_scale_are_kept(half_engines):
    _, manifest = half_engines
    for variant in manifest.stages["step"]:
        scales = variant.parity["units"]
        assert [s["tokens"] for s in scales] == [9, 36, 81]
        for scale in scales:
            assert scale["agreement"] >= 0.95
            assert abs(scale["kl_mean"]) < 1e-3
        assert variant.parity["outputs"]["logits"]["range"] > 0
    full, half = (v.parity for v in manifest.stages["decoder"])
    assert full["psnr_db"] >= 80
    assert 45 <= half["psnr_db"] < full["psnr_db"]
    assert full["free_running"]["token_agreement"] == 1
    assert 0.5 < half["free_running"]["token_agreement"] <= 1
    half_error, full_error = (
        manifest.stages["step"][i].parity["outputs"]["logits"]["relative"] for i in (1, 0)
    )
    assert full_error < 1e-5 < half_error < 1e-2


def perturb(system, name: str, amount: float):
    """Return a copy of the model with one weight tensor changed by `amount` of its size."""
    changed = copy.deepcopy(system)
    parameter = changed.get_parameter(name)
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parameter.add_(noise * parameter.std() * amount)
    return changed


@pytest.mark.parametrize(
    ("stage", "weight"),
    [
        ("step", "predictor.blocks.0.ffn.fc2.weight"),
        ("condition", "predictor.blocks.0.cross.kv.weight"),
        ("accumulate", "predictor.word_embed.weight"),
        ("select", "vae.quantize.embedding.weight"),
        ("decoder", "vae.decoder.conv_in.weight"),
    ],
)
def test_a_slightly_wrong_weight_fails_the_fp32_gate(reference, system, stage, weight):
    wrong = torch_subject(perturb(system, weight, 0.01), stage)
    with pytest.raises(ParityError, match=rf"{stage}: .*limit"):
        held(wrong, reference)


@pytest.mark.parametrize(
    ("stage", "weight"),
    [
        ("step", "predictor.blocks.0.attn.mat_qkv.weight"),
        ("condition", "predictor.blocks.0.ada_lin.1.weight"),
        ("decoder", "vae.decoder.conv_in.weight"),
    ],
)
def test_a_wrong_weight_fails_the_fp16_gate(reference, system, stage, weight):
    wrong = torch_subject(perturb(system, weight, 1.0), stage, "fp16")
    with pytest.raises(ParityError, match=rf"{stage}: .*limit"):
        held(wrong, reference)


def test_a_changed_initializer_in_a_graph_is_caught(half_engines, reference, tmp_path):
    held(onnx_subject(half_engines, "decoder", "fp16"), reference)
    folder, manifest = half_engines
    variant = next(v for v in manifest.stages["decoder"] if v.precision == "fp16")
    model = onnx.load(folder / next(iter(variant.files)))
    weight = max(model.graph.initializer, key=lambda t: t.ByteSize())
    values = numpy_helper.to_array(weight).copy()
    values[:1] = 0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    wrong = onnx_subject(half_engines, "decoder", "fp16", tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"decoder here: call 0, image: PSNR .* limit 45"):
        held(wrong, reference)


def test_a_graph_that_forgets_its_past_fails_at_the_second_scale(reference, system):
    """What a module with its cache frozen in would do: right on the first step only."""
    wrong = torch_subject(system, "step")

    def forgetful(q, k, v, past, *, scale):
        empty = tuple(tensor[:0] for tensor in past)
        return attend_delta(q, k, v, empty, scale=scale)

    wrong.backend._stages["step"].attend = forgetful
    with pytest.raises(ParityError, match="step: call 1, logits"):
        held(wrong, reference)


def test_an_output_that_is_not_finite_fails_in_every_precision(reference, system):
    changed = copy.deepcopy(system)
    with torch.no_grad():
        changed.predictor.head.bias[3] = float("inf")
    for precision in LIMITS:
        with pytest.raises(ParityError):
            held(torch_subject(changed, "step", precision), reference)


def test_a_missed_gate_stops_the_export_and_keeps_nothing_of_the_stage(
    small_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setitem(LIMITS, "fp32", replace(LIMITS["fp32"], psnr_db=300.0))
    folder = tmp_path / "engines"
    options = ExportOptions(
        checkpoint=str(small_checkpoint), engine_dir=str(folder), targets=("onnxruntime",)
    )
    with pytest.raises(ParityError, match=r"decoder \(onnxruntime fp32\): .*PSNR .*limit 300"):
        run_export(options)
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob(".export/decoder/*/*"))


def test_flips_are_benign_only_within_the_measured_error():
    assert Flip(margin=1e-4, error=2e-4).is_benign
    assert not Flip(margin=2e-4, error=1e-4).is_benign


def test_a_flip_near_the_edge_of_its_interval_is_counted_with_its_margin(reference):
    """The draw is put 1e-4 beside the edge between two codes; the error moves the edge by more."""
    calls = reference.batches[1].recording.calls
    select = next(c for c in calls if c.stage == "select")
    backend = reference.pipeline.backend
    same = compare_tokens(select, redrawn(backend, select, select.feeds["logits"]))
    assert (same.agreement, same.kl_sum, same.flips) == (1.0, 0.0, ())
    logits = select.feeds["logits"].astype(np.float64)
    cumulative = np.exp(logits - logits.max()).cumsum(-1)
    cumulative /= cumulative[..., -1:]
    code = int(np.abs(cumulative[0, 0] - 0.5).argmin())
    uniforms = np.full_like(select.feeds["uniforms"], cumulative[0, 0, code] - 1e-4)
    feeds = {**select.feeds, "uniforms": uniforms}
    run = backend.run(select.stage, {n: backend.upload(a) for n, a in feeds.items()})
    outputs = {name: backend.download(run[name]) for name in select.outputs}
    assert outputs["tokens"][0, 0] == code
    shifted = select.feeds["logits"].copy()
    shifted[..., code + 1] += 1.0  # takes probability from all codes before
    moved = replace(select, feeds=feeds, outputs=outputs)
    figures = compare_tokens(moved, redrawn(backend, moved, shifted))
    (flip,) = figures.flips
    assert flip.margin == pytest.approx(1e-4, rel=0.01)
    assert flip.error > flip.margin
    assert flip.is_benign


def test_fp16_allows_one_percent_of_flips_and_the_chance_that_small_scales_have():
    assert LIMITS["fp32"].allowed_flips(10_000) == 0
    assert [LIMITS["fp16"].allowed_flips(n) for n in (1, 100, 100_000)] == [1, 4, 1095]


def test_psnr_of_equal_images_is_finite_and_of_nan_is_zero():
    image = np.zeros((1, 3, 2, 2), np.float32)
    assert psnr_db(image, image) == 200.0
    assert psnr_db(image, image + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(image, image * np.nan) == 0.0


def test_bfloat16_stages_are_checked_in_pytorch(reference, system):
    from nsp.export.graph.narrow import at_precision

    var = family("var")
    declared = var.stages(system.config, kv_layout="delta", dtype="bfloat16")
    narrowed = at_precision(system, declared, "bf16")
    io = {name: stage.io for name, stage in declared.items()}
    backend = TorchBackend(var.learner.modules(narrowed, "delta"), io, device="cpu")
    for stage in ("condition", "step", "decoder"):
        figures = held(subject(declared[stage], stage, backend, "bf16"), reference)
        assert figures["calls"] > 0
