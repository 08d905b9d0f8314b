"""What opening an engine folder promises: the right stages, or one line that ends the search."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from nsp.artifacts import engine_choice
from nsp.artifacts.engines import open_engine_dir
from nsp.artifacts.manifest import MANIFEST_NAME, TOKENIZER_DIR, Variant, read_manifest
from nsp.backends.available import BACKENDS, Availability, BackendRecord
from nsp.backends.nvidia import Gpu
from nsp.backends.onnxruntime.ort_backend import OnnxRuntimeBackend
from nsp.errors import BackendError, ConfigError, EngineError, NspError
from nsp.pipeline.pipeline import load_pipeline
from tests.artifacts.engine_folders import (
    CLASSES,
    TEXT,
    change_manifest,
    engine_file,
    write_engines,
)
from tests.models import stages_io


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    folder = tmp_path / "engines"
    write_engines(folder, precisions=("fp32", "fp16"), max_batch=8)
    return folder


def refusal(folder: Path, kind: type[NspError] = EngineError, **options: Any) -> str:
    """Return the message with which opening `folder` fails: one line."""
    with pytest.raises(kind) as caught:
        open_engine_dir(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_opening_returns_every_stage_and_the_batch_limit(engines: Path) -> None:
    opened = open_engine_dir(engines)
    assert isinstance(opened.backend, OnnxRuntimeBackend)
    opened.backend.wait()
    assert dict(opened.backend.stages_io) == stages_io(CLASSES, "present", "float32")
    assert opened.backend.kv_layout == "present"
    assert (opened.tokenizer, opened.max_batch) == (None, 8)
    assert opened.family.name == "var"


def test_a_cpu_gets_fp32_and_auto_says_why(engines: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        opened = open_engine_dir(engines, device="cpu")
    assert opened.backend.kv_dtype() == "float32"
    assert "backend onnxruntime on cpu" in caplog.text
    assert "fp32" in caplog.text


def test_a_gpu_gets_fp16(engines: Path) -> None:
    manifest = read_manifest(engines)
    for device, precision in (("cuda", "fp16"), ("cpu", "fp32")):
        chosen = engine_choice.choose_variants(
            engines,
            manifest,
            BACKENDS["onnxruntime"],
            device=device,  # type: ignore[arg-type]
            precision=None,
        )
        assert chosen.precision == precision
        assert {variant.precision for variant in chosen.stages.values()} == {precision}


def test_the_asked_precision_is_taken(engines: Path) -> None:
    assert open_engine_dir(engines, precision="fp16").backend.kv_dtype() == "float16"


def test_a_stage_of_one_precision_joins_the_set_its_tensors_fit(tmp_path: Path) -> None:
    manifest = write_engines(tmp_path, precisions=("fp32", "fp16"))
    only_fp32 = {"select", "select_smooth", "accumulate"}
    stages = {
        stage: tuple(v for v in variants if stage not in only_fp32 or v.precision == "fp32")
        for stage, variants in manifest.stages.items()
    }
    change_manifest(tmp_path, stages=stages)
    assert open_engine_dir(tmp_path, precision="fp16").backend.kv_dtype() == "float16"
    del stages["condition"]
    change_manifest(tmp_path, stages=stages)
    assert "stage condition is missing because the export is incomplete" in refusal(tmp_path)


def test_stages_with_caches_of_different_dtypes_are_never_mixed(tmp_path: Path) -> None:
    manifest = write_engines(tmp_path, TEXT, precisions=("fp32", "fp16"))
    halves = {
        stage: tuple(v for v in variants if v.precision == ("fp16" if stage == "step" else "fp32"))
        for stage, variants in manifest.stages.items()
    }
    change_manifest(tmp_path, stages=halves)
    message = refusal(tmp_path)
    assert "no fp32 engine of stage step has the tensors that this nsp expects" in message


def test_a_precision_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    write_engines(tmp_path)
    message = refusal(tmp_path, precision="fp16")
    assert message.startswith(f"{tmp_path} has no fp16 engines for onnxruntime (it has fp32)")
    assert message.endswith("--checkpoint tests --target onnxruntime --fp16 --fp32")
    assert "precision 'fp8' is unknown" in refusal(tmp_path, ConfigError, precision="fp8")
    message = refusal(tmp_path, ConfigError, precision="bf16")
    assert message.startswith("onnxruntime runs fp")
    assert message.endswith("not bf16")


def test_a_folder_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "nowhere does not exist" in message
    assert f"nsp export --engine-dir {tmp_path / 'nowhere'}" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 3}', "\x00", "null"])
def test_a_damaged_manifest_is_refused(engines: Path, text: str) -> None:
    (engines / MANIFEST_NAME).write_text(text)
    message = refusal(engines)
    assert "is damaged" in message
    assert "nsp export" in message


def test_a_manifest_cut_off_anywhere_is_refused(engines: Path) -> None:
    whole = (engines / MANIFEST_NAME).read_text()
    for length in range(0, len(whole) - 2, len(whole) // 40):
        (engines / MANIFEST_NAME).write_text(whole[:length])
        assert "is damaged" in refusal(engines)


def test_a_manifest_of_another_schema_is_refused(engines: Path) -> None:
    change_manifest(engines, schema=99)
    assert "has schema 99, this nsp reads 3" in refusal(engines)


def test_a_family_from_the_future_is_refused(engines: Path) -> None:
    change_manifest(engines, family="var9000")
    message = refusal(engines)
    assert "unknown family 'var9000'" in message
    assert "nsp export" in message


def test_a_configuration_from_the_future_is_refused(engines: Path) -> None:
    change_manifest(engines, config={**CLASSES.to_dict(), "num_eyes": 3})
    assert "unknown key 'num_eyes'" in refusal(engines)


def test_engines_for_another_configuration_are_refused(engines: Path) -> None:
    bigger = dataclasses.replace(CLASSES.predictor, depth=3)
    change_manifest(engines, config=dataclasses.replace(CLASSES, predictor=bigger).to_dict())
    assert "has the tensors that this nsp expects (perhaps another version" in refusal(engines)


def step_file(folder: Path) -> Path:
    return engine_file(folder, "step")


def test_a_missing_file_is_named(engines: Path) -> None:
    path = step_file(engines)
    path.unlink()
    message = refusal(engines)
    assert f"{path} is missing though the manifest lists it" in message
    again = f"run: nsp export --engine-dir {engines} --checkpoint tests"
    assert again in message


def test_a_truncated_file_is_named(engines: Path) -> None:
    os.truncate(step_file(engines), step_file(engines).stat().st_size - 1)
    assert f"{step_file(engines)} differs from what was exported" in refusal(engines)


def test_a_folder_whose_name_is_not_utf8_is_one_line_that_says_so(engines: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(engines) + b"\xe9"))
    engines.rename(odd)
    message = refusal(odd)
    assert "engines\\xe9 has a name that is not UTF-8, which ONNX Runtime" in message
    assert message.endswith("cannot open; rename the folder")


def test_a_file_with_one_other_bit_is_named(engines: Path) -> None:
    content = bytearray(step_file(engines).read_bytes())
    content[len(content) // 2] ^= 1
    step_file(engines).write_bytes(content)
    assert f"{step_file(engines)} differs from what was exported" in refusal(engines)


def test_files_of_variants_that_are_not_used_are_not_read(engines: Path) -> None:
    engine_file(engines, "step", "onnxruntime-fp16").unlink()
    open_engine_dir(engines, precision="fp32")


def test_without_verification_a_damaged_model_is_still_one_line(engines: Path) -> None:
    step_file(engines).write_bytes(b"not a model")
    opened = open_engine_dir(engines, verify=False)
    assert isinstance(opened.backend, OnnxRuntimeBackend)
    with pytest.raises(EngineError, match=r"model\.onnx cannot be loaded") as caught:
        opened.backend.wait()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret.onnx", "/etc/passwd", "step/../../x"])
def test_a_manifest_that_points_outside_its_folder_is_refused(engines: Path, name: str) -> None:
    manifest = read_manifest(engines)
    stages = {
        stage: tuple(dataclasses.replace(v, files={name: "0" * 64}) for v in variants)
        for stage, variants in manifest.stages.items()
    }
    change_manifest(engines, stages=stages)
    assert f"the manifest lists {name}, which no export writes" in refusal(engines, verify=False)


def test_an_unknown_backend_is_named_with_the_known_ones(engines: Path) -> None:
    message = refusal(engines, ConfigError, backend="openvino")
    assert message.startswith("unknown backend 'openvino'; known: auto, ")


def test_torch_does_not_run_engines(engines: Path) -> None:
    assert "torch backend cannot run" in refusal(engines, ConfigError, backend="torch")


def test_a_backend_without_engines_here_says_how_to_build_them(engines: Path) -> None:
    message = refusal(engines, backend="tensorrt-rtx")
    assert "has no engines for tensorrt_rtx (it has: onnxruntime)" in message
    assert message.endswith("--checkpoint tests --target tensorrt-rtx")


def test_a_stage_without_an_engine_is_an_incomplete_export(engines: Path) -> None:
    stages = dict(read_manifest(engines).stages)
    change_manifest(engines, stages={**stages, "decoder": ()})
    message = refusal(engines, backend="onnxruntime")
    assert "stage decoder has no onnxruntime engine, the export is incomplete" in message
    assert "no backend has an engine of every stage" in refusal(engines)


def test_a_gpu_that_is_not_there_is_refused(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = Availability(True, "runs engines on the CPU", "pip install onnxruntime-gpu", "cpu")
    monkeypatch.setattr(engine_choice, "availability", lambda name: on_cpu)
    message = refusal(engines, BackendError, device="cuda")
    assert "onnxruntime cannot use a GPU on this machine: it runs engines on the CPU" in message
    assert "run: pip install onnxruntime-gpu" in message
    assert "onnxruntime runs on cpu or cuda, not on 'tpu'" in refusal(
        engines, ConfigError, device="tpu"
    )


def test_a_backend_that_does_not_work_says_why_and_what_to_install(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Availability(False, "onnxruntime is not installed", "pip install onnxruntime")
    monkeypatch.setattr(engine_choice, "availability", lambda name: absent)
    for backend in ("auto", "onnxruntime"):
        message = refusal(engines, BackendError, backend=backend)
        assert "onnxruntime is not installed; run: pip install onnxruntime" in message


def write_rtx(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Write TensorRT-RTX engines, and pretend to be on a machine that could run them."""
    write_engines(folder, backend="tensorrt_rtx", kv_layout="delta", **changes)
    monkeypatch.setattr(BackendRecord, "version", lambda self: "1.7.1")
    gpu = Gpu(name="NVIDIA RTX 4090", compute_capability="8.9", driver_cuda="13.0")
    monkeypatch.setattr(engine_choice, "find_gpu", lambda: gpu)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"tools": {"tensorrt_rtx": "1.4.0"}}, "tensorrt_rtx 1.4.0, but 1.7.1 is installed"),
        ({"device": {"os": "windows"}}, "os windows, but this machine has linux"),
        (
            {"device": {"compute_capability": "12.0 12.1"}},
            "compute capability 12.0 12.1, but NVIDIA RTX 4090 has 8.9",
        ),
    ],
)
def test_an_engine_for_another_machine_says_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], difference: str
) -> None:
    write_rtx(tmp_path, monkeypatch, **changes)
    message = refusal(tmp_path, backend="tensorrt-rtx")
    assert f"the tensorrt_rtx engine of stage condition is for {difference}" in message
    again = f"nsp export --engine-dir {tmp_path} --checkpoint tests"
    assert message.endswith(f"run: {again} --target tensorrt-rtx --fp32")


def test_an_engine_for_this_machine_is_not_run_by_this_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {"tools": {"tensorrt_rtx": "1.7.1"}, "device": {"compute_capability": "8.6 8.9"}}
    write_rtx(tmp_path, monkeypatch, **same)
    message = refusal(tmp_path, BackendError, backend="tensorrt-rtx")
    assert message.startswith("tensorrt_rtx: ")


def test_auto_passes_over_engines_it_cannot_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_engines(tmp_path)
    rtx = write_engines(tmp_path, backend="tensorrt_rtx", kv_layout="delta", precisions=("fp16",))
    both: dict[str, tuple[Variant, ...]] = {
        stage: (*rtx.stages[stage], *manifest.stages[stage]) for stage in manifest.stages
    }
    change_manifest(tmp_path, stages=both)
    with caplog.at_level(logging.INFO):
        opened = open_engine_dir(tmp_path)
    assert opened.backend.name == "onnxruntime"
    assert opened.backend.kv_layout == "present"
    assert "because tensorrt_rtx: " in caplog.text


def test_a_text_model_brings_its_tokenizer(tmp_path: Path) -> None:
    write_engines(tmp_path, TEXT)
    opened = open_engine_dir(tmp_path)
    assert opened.tokenizer is not None
    assert opened.tokenizer.encode(["red apple"]).shape == (1, TEXT.text.max_tokens)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "vocab.json"])
def test_a_file_beside_the_tokenizer_that_is_not_listed_changes_nothing(
    tmp_path: Path, name: str
) -> None:
    write_engines(tmp_path, TEXT)
    opened = open_engine_dir(tmp_path)
    assert opened.tokenizer is not None
    before = opened.tokenizer.encode(["red apple", ""])
    (folder,) = tmp_path.glob(f"{TOKENIZER_DIR}/*")
    (folder / name).write_text('{"pad_token": "!", "eos_token": "!", "!": 3}')
    opened = open_engine_dir(tmp_path)
    assert opened.tokenizer is not None
    assert (opened.tokenizer.encode(["red apple", ""]) == before).all()


def test_a_tokenizer_that_is_missing_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_engines(tmp_path, TEXT)
    (config,) = tmp_path.glob(f"{TOKENIZER_DIR}/*/tokenizer_config.json")
    config.write_text(config.read_text().replace('"model_max_length": 8', '"model_max_length": 9'))
    assert "differs from what was exported" in refusal(tmp_path)
    message = refusal(tmp_path, verify=False)
    assert "makes prompts of 9 tokens, the text encoder takes 8" in message
    for path in config.parent.iterdir():
        path.unlink()
    assert "is missing though the manifest lists it" in refusal(tmp_path)
    change_manifest(tmp_path, files={})
    assert "nsp export" in refusal(tmp_path)


def test_load_pipeline_takes_an_engine_folder(engines: Path) -> None:
    pipe = load_pipeline(engines, precision="fp16", num_threads=1)
    assert pipe.backend.kv_dtype() == "float16"
    with pytest.raises(ConfigError, match=r"batch of 9 is outside the engine's 1\.\.8"):
        pipe.stream(class_ids=range(9))
