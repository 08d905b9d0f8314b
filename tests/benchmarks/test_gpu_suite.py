"""What the GPU suite promises: the whole path on a CPU too, ceilings as calculated, one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from nsp.backends.nvidia import find_gpu
from nsp.benchmarks import gpu_contestants, gpu_suite
from nsp.benchmarks.ceilings.gpu import Clock, GpuCeilings, measure_gpu_ceilings
from nsp.benchmarks.gpu_contest import contest, fresh_process, part_costs
from nsp.benchmarks.gpu_contestants import ENTRIES, Entry, Place
from nsp.benchmarks.gpu_results import (
    DECODER,
    IMAGE,
    LOOP,
    Contest,
    GpuObservation,
    SuiteResult,
    summary_rows,
)
from nsp.benchmarks.gpu_suite import JSON_NAME, MARKDOWN_NAME, SuiteOptions, main, run
from nsp.benchmarks.random_model import random_config, write_random_model
from nsp.errors import ConfigError
from nsp.pipeline.pipeline import Pipeline

H200 = GpuCeilings(  # rates for which times are calculated by hand below
    device="H200",
    dtype="float16",
    gemm_side=8192,
    gemm_gflops=(790e3,),
    copy_mib=1024,
    copy_gb_s=(4300.0,),
    launch_us=5.0,
    graph_kernel_us=2.0,
)


@pytest.mark.parametrize(
    ("size", "batch", "roof_ms"),
    [("d16", 1, 1.33), ("d16", 8, 6.30), ("d30", 1, 8.43), ("d30", 8, 39.7)],
)
def test_the_roof_is_near_the_one_calculated_from_weights_and_cache_alone(
    size: str, batch: int, roof_ms: float
) -> None:
    """Ours adds modulations, logits and the selection's traffic, and joins no scales."""
    cost = part_costs(random_config(size), batch, "fp16", H200)[LOOP]
    assert roof_ms * 0.97 < cost.roof_ms < roof_ms * 1.25


def test_parts_add_up_and_the_decoder_is_the_published_work() -> None:
    costs = part_costs(random_config("d16"), 1, "fp16", H200)
    assert costs[IMAGE].gflop == pytest.approx(costs[LOOP].gflop + costs[DECODER].gflop)
    assert costs[DECODER].gflop == pytest.approx(394, rel=0.02)
    assert costs[LOOP].gflop == pytest.approx(600, rel=0.03)
    assert costs[LOOP].launch_ms == pytest.approx(2.24)  # 16 blocks, 10 scales, 7 kernels of 2 us


def test_rows_leave_out_the_warm_up_and_compare_with_eager() -> None:
    observations = [
        GpuObservation(
            contestant=name, round=number, place=0, image=ms * scale, loop=ms, decoder=ms
        )
        for name, scale in (("torch eager", 10.0), ("fast", 1.0))
        for number, ms in ((-1, 1000.0), (0, 1.0), (1, 2.0), (2, 3.0))
    ]
    costs = part_costs(random_config("tiny"), 1, "fp32", H200)
    rows = {(r.contestant, r.part): r for r in summary_rows(observations, costs, "torch eager")}
    fast = rows["fast", IMAGE]
    assert (fast.p50_ms, fast.count, fast.speedup) == (2.0, 3, 10.0)
    assert fast.p95_ms == pytest.approx(2.9)
    assert fast.tflop_s == pytest.approx(costs[IMAGE].gflop / 2)
    assert fast.gb_s == pytest.approx(costs[IMAGE].mib * 2**20 / 2e6)
    assert fast.of_roof == pytest.approx(costs[IMAGE].roof_ms / 2)
    assert rows["torch eager", LOOP].speedup == 1


def fails(place: Place) -> Pipeline:
    raise RuntimeError("the compiler gave up\nwith a long story")


def test_the_whole_suite_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Entry(name="broken", load=fails)
    entries = {**ENTRIES, "broken": broken}
    for module in ("gpu_contest", "gpu_contestants", "gpu_suite"):
        monkeypatch.setattr(f"nsp.benchmarks.{module}.ENTRIES", entries)
    options = SuiteOptions(
        output_dir=tmp_path,
        sizes=("tiny",),
        batches=(2,),
        quick=True,
        precision="fp32",
        device="cpu",
        only=("torch eager", "torch graphs", "onnxruntime graphs", "tensorrt-rtx", "broken"),
        fresh_processes=False,
        compiler="aot_eager",
    )
    monkeypatch.setattr(gpu_contestants, "export", lambda options: None)  # tests/export does that
    monkeypatch.setattr(
        gpu_contestants, "read_manifest", lambda folder: type("Manifest", (), {"stages": {}})()
    )
    result = run(options)
    (contest,) = result.contests
    assert set(contest.missing) == {"onnxruntime graphs", "tensorrt-rtx", "broken"}
    assert contest.missing["onnxruntime graphs"] == "CUDA graphs need a GPU"
    assert contest.missing["broken"] == "the compiler gave up with a long story"
    assert {(r.contestant, r.part) for r in contest.rows} == {
        (name, part) for name in ("torch eager", "torch graphs") for part in (IMAGE, LOOP, DECODER)
    }
    assert all(row.count == 5 and 0 < row.p50_ms <= row.p95_ms for row in contest.rows)
    assert [o.round for o in contest.observations] == [n for n in range(-1, 5) for _ in range(2)]
    first = [o.contestant for o in contest.observations if o.place == 0]
    assert first[1:] == [*("torch eager", "torch graphs") * 2, "torch eager"]
    for agreement in contest.parity.values():
        assert agreement.token_agreement == 1
        assert agreement.max_relative_error < 1e-5
    values = json.loads((tmp_path / JSON_NAME).read_text())
    assert SuiteResult.from_dict(values) == result
    assert str(tmp_path) not in json.dumps(values)
    text = (tmp_path / MARKDOWN_NAME).read_text()
    assert "## tiny, batch 2" in text
    assert "Missing: broken: the compiler gave up" in text


def test_a_contestant_that_fails_late_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(place: Place) -> Pipeline:
        pipeline = ENTRIES["torch eager"].load(place)

        def play(*inputs: object, trace: bool) -> object:
            raise KeyError("not finite")

        monkeypatch.setattr(pipeline, "_play", play)
        return pipeline

    entries = {**ENTRIES, "late": Entry(name="late", load=diverges)}
    monkeypatch.setattr("nsp.benchmarks.gpu_contest.ENTRIES", entries)
    place = Place(folder=tmp_path, batch=1, precision="fp32", device="cpu")
    only = ("late", "torch eager")
    found = contest("tiny", place, H200, only=only, fresh_processes=False, rounds=(0, 1))
    assert found.missing == {"late": "'not finite'"}
    assert {row.contestant for row in found.rows} == {"torch eager"} == set(found.parity)


def test_a_contestant_in_a_process_of_its_own(tmp_path: Path) -> None:
    place = Place(folder=tmp_path, batch=1, precision="fp32", device="cpu")
    write_random_model(place.checkpoint, random_config("tiny"))
    found = fresh_process("torch graphs", place, {"class_ids": [1], "seed": 0})
    assert 0 < found.load_ms < found.first_image_ms
    assert found.second_ms > 0
    assert found.host_peak_mib > 50
    assert found.gpu_peak_mib is None


def test_work_left_on_another_stream_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's decoder returns when it is enqueued, on a stream that torch knows nothing of."""
    now = {"host": 0.0, "device": 0.0}  # ms; the device is busy until then

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.ms = now["host"]  # torch's own stream is idle

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return other.ms - self.ms

    def enqueue() -> None:
        now["device"] = now["host"] + 7

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.update(host=now["device"]))
    assert Clock("cuda").ms(enqueue) == 7


def test_ceilings_are_measured_where_the_work_is_done() -> None:
    found = measure_gpu_ceilings("cpu", "fp32", quick=True)
    assert len(found.gemm_gflops) == len(found.copy_gb_s) == 5
    assert found.gemm_peak_gflops == max(found.gemm_gflops) > 0.1
    assert found.launch_us > 0
    assert found.graph_kernel_us is None
    assert found.launch_ms(16, 10) == pytest.approx(1e-3 * found.launch_us * 7 * 160)


def test_what_was_measured_stays_when_a_later_contest_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_fails(size: str, place: Place, *args: Any, **settings: Any) -> Contest:
        if place.batch == 2:
            raise KeyboardInterrupt
        return Contest(
            size=size,
            batch=place.batch,
            parameters=1,
            costs={},
            rows=(),
            parity={},
            fresh={},
            build_s={},
            missing={},
            observations=(),
        )

    monkeypatch.setattr(gpu_suite, "markdown", lambda result: "")
    monkeypatch.setattr(gpu_suite, "contest", second_fails)
    monkeypatch.setattr(gpu_suite, "measure_gpu_ceilings", lambda *args, **settings: H200)
    options = SuiteOptions(output_dir=tmp_path, sizes=("tiny",), batches=(1, 2), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run(options)
    kept = json.loads((tmp_path / JSON_NAME).read_text())
    assert [contest["batch"] for contest in kept["contests"]] == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the suite would run")
def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--output-dir", str(tmp_path)])
    assert done.exit_code == 1
    expected = (
        "there is none; to check only the suite, run" if find_gpu() is None else "does not use"
    )
    assert expected in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": ("d17",)}, "unknown var size 'd17'"),
        ({"only": ("torch",)}, "unknown contestant 'torch'; known: torch eager"),
        ({"batches": (0,)}, "at least 1"),
    ],
)
def test_options_are_checked(tmp_path: Path, change: dict[str, tuple[str, ...]], message: str):
    with pytest.raises(ConfigError, match=message):
        SuiteOptions(output_dir=tmp_path, **change)  # type: ignore[arg-type]


def test_numbers_on_the_command_line_are_checked(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--batch", "1,x", "--output-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert "--batch '1,x': give numbers" in done.output
