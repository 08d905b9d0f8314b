"""What the GPU suite promises: the whole path on a CPU too, ceilings, one line."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nsp.backends.nvidia import find_gpu
from nsp.benchmarks.ceilings.clock import Clock
from nsp.benchmarks.ceilings.gpu import measure_gpu_ceilings
from nsp.benchmarks.gpu_suite import SuiteOptions, main, run
from nsp.benchmarks.random_model import find_size, random_system
from nsp.benchmarks.record.result import BenchResult
from nsp.benchmarks.render.contender_tables import tokens_section
from nsp.errors import ConfigError


@pytest.mark.slow
def test_the_whole_suite_runs_on_a_cpu(tmp_path: Path) -> None:
    options = SuiteOptions(
        output_dir=tmp_path / "found",
        sizes=("tiny",),
        batches=(2,),
        quick=True,
        precision="fp32",
        device="cpu",
        only=("tensorrt-rtx", "onnxruntime", "torch graphs", "onnxruntime graphs"),
        fresh_processes=False,
    )
    (report,) = run(options)
    result = report.result
    assert report.json_path == tmp_path / "found/tiny-batch2/bench.json"
    assert (result.contender, result.baseline) == ("onnxruntime", "torch")
    (batch,) = result.batches
    assert batch.rounds == 5
    assert tokens_section(result) is None  # its steps draw many tokens
    entries = {entry.name: entry for entry in result.others}
    assert "onnxruntime graphs" in entries
    assert "only on a GPU" in (entries["onnxruntime graphs"].missing or "")
    assert entries["torch graphs"].missing is None
    assert all(ms > 0 for ms in batch.times("torch graphs", batch.loop_ms))
    assert result.parity is not None
    assert result.parity.token_agreement == 1
    assert str(tmp_path) not in json.dumps(json.loads(report.json_path.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["next_patch", "latent_gpt"])
def test_models_that_draw_code_by_code_have_their_time_per_code_beside_its_bytes(
    family: str, tmp_path: Path
) -> None:
    options = SuiteOptions(
        output_dir=tmp_path / "found",
        sizes=(f"{family}/tiny",),
        batches=(1,),
        quick=True,
        precision="fp32",
        device="cpu",
        only=("onnxruntime",),
        fresh_processes=False,
    )
    (report,) = run(options)
    assert report.json_path == tmp_path / f"found/{family}-tiny-batch1/bench.json"
    result = BenchResult.from_dict(json.loads(report.json_path.read_text()))
    assert result.model.family == family
    (batch,) = result.batches
    read_mib = batch.token_mib(result.model)
    assert read_mib == result.model.read_mib["decode"]
    # All weights of the transformer but what is looked up or computed before the loop.
    system = random_system(*find_size("tiny", family))
    tables = (
        "tok_embeddings",
        "token_embedding",
        "position_embedding",
        "cls_embedding",
        "cross.kv",
    )
    weights = system.gpt.named_parameters()
    counted = sum(w.nbytes for name, w in weights if not any(t in name for t in tables))
    assert read_mib == pytest.approx(counted / 2**20, rel=0.02)
    section = tokens_section(result)
    assert section is not None
    assert [row[0] for row in section.rows] == ["onnxruntime, batch 1", "torch, batch 1"]
    assert all(float(cell) > 0 for row in section.rows for cell in row[1:])
    assert "## Time per token" in report.markdown_path.read_text()


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

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.update(host=now["device"]))
    assert Clock("cuda").ms(enqueue) == 7


def test_ceilings_are_measured_where_the_work_is_done() -> None:
    found = measure_gpu_ceilings("cpu", "fp32", repeats=2, side=64, copy_mib=1)
    assert found.gemm_peak_gflops > 0.01
    assert found.launch_us is not None
    assert found.launch_us > 0
    assert found.graph_kernel_us is None
    assert found.launch_ms(16) == pytest.approx(1e-3 * found.launch_us * 7 * 16)


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
        ({"sizes": ("d17",)}, "unknown size 'd17'"),
        ({"only": ("torch ",)}, "contender 'torch ' is unknown; known: torch eager"),
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
