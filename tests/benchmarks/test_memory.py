import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nsp.benchmarks.ceilings.cpu import measure_ceilings
from nsp.benchmarks.ceilings.rates import Ceilings
from nsp.benchmarks.contest.cold import cold_run
from nsp.benchmarks.contest.contenders import Source
from nsp.benchmarks.record.cold import ColdRun
from nsp.benchmarks.record.environment import Environment, OtherWork, instructions
from nsp.benchmarks.record.result import BenchResult
from nsp.errors import BackendError

PEAK = "from nsp.benchmarks.contest.cold_program import resident_mib; print(resident_mib('VmHWM'))"


def test_the_peak_of_a_fresh_process_is_its_own_and_not_its_parents() -> None:
    ballast = np.ones(300 << 17)  # 300 MiB, in this process
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert ballast.nbytes == 300 << 20
    assert 2 < float(done.stdout) < 150


def test_a_fresh_process_measures_start_up_in_order_and_memory(result: BenchResult) -> None:
    (run,) = result.cold_runs
    moments = (run.python_ms, run.imported_ms, run.loaded_ms, run.first_step_ms, run.image_ms)
    assert list(moments) == sorted(moments)
    assert min(moments) > 0
    assert run.first_call_ms == pytest.approx(run.image_ms - run.loaded_ms)
    assert 0 < run.imported_mib < run.loaded_mib <= run.peak_mib
    assert run.torch_imported
    assert list(run.stage_ms) == [
        "text_encoder",
        "condition",
        "step",
        "select",
        "accumulate",
        "decoder",
    ]
    assert sum(run.stage_ms.values()) < run.first_call_ms
    assert run.stage_mib.keys() == run.stage_ms.keys()


def test_memory_growth_is_from_one_stage_to_the_next() -> None:
    times = dict.fromkeys(
        ("python_ms", "imported_ms", "loaded_ms", "first_step_ms", "image_ms"), 1.0
    )
    run = ColdRun(
        contender="a",
        batch=1,
        **times,
        stage_ms={"step": 1.0, "decoder": 2.0},
        stage_mib={"step": 120.0, "decoder": 150.0},
        imported_mib=40.0,
        loaded_mib=100.0,
        peak_mib=160.0,
        torch_imported=False,
    )
    assert run.stage_growth_mib("step") == 20
    assert run.stage_growth_mib("decoder") == 30


def test_a_failing_process_is_one_line_that_ends_with_its_message() -> None:
    source = Source(label="a", path=Path("nowhere"), backend="auto")
    with pytest.raises(BackendError, match="nowhere does not exist") as caught:
        cold_run(source, {}, batch=1, threads=1)
    assert "\n" not in str(caught.value)


def test_ceilings_are_measured_and_joined_in_order() -> None:
    first = measure_ceilings(threads=1, gemm_side=64)
    assert first.gemm_peak_gflops > 0
    assert first.bandwidth_gb_s > 0
    assert (first.threads, first.gemm_side, first.drift) == (1, 64, 0)
    second = Ceilings(threads=1, gemm_side=64, gemm_gflops={"numpy": (1e9,)}, copy_gb_s=(1e9,))
    both = first.joined(second)
    assert both.gemm_gflops["numpy"] == (*first.gemm_gflops["numpy"], 1e9)
    assert both.gemm_peak_gflops == both.bandwidth_gb_s == 1e9
    assert both.drift == pytest.approx(1, abs=1e-3)


def test_the_environment_names_the_machine_and_survives_json() -> None:
    found = Environment.read(threads=2)
    assert found.threads == 2
    assert found.cpu
    assert 1 <= found.usable_cores <= found.logical_cores
    assert found.packages["numpy"] == np.__version__
    assert Environment.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_other_work_is_all_work_but_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(10.0, 100.0, 7.0), (12.0, 104.0, 10.0), None])  # wall, all, own seconds
    monkeypatch.setattr(OtherWork, "_clocks", staticmethod(lambda children: next(clocks)))
    meter = OtherWork()
    assert meter.cores() == pytest.approx((4 - 3) / 2)
    assert meter.cores() is None  # no /proc


def test_the_clocks_of_this_machine_only_go_forward() -> None:
    before = OtherWork._clocks(())
    after = OtherWork._clocks(())
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert all(a <= b for a, b in zip(before, after, strict=True))
        assert after[0] > before[0]


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({"sse2", "avx2"}, "AVX2"),
        (
            {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"},
            "AVX2, AVX-512, VNNI, BF16, AMX",
        ),
        ({"avx2", "avx_vnni"}, "AVX2, VNNI"),
        ({"asimd", "asimddp", "bf16"}, "VNNI, BF16, NEON"),
        (set(), "unknown"),
    ],
)
def test_the_kind_of_a_processor_is_what_decides_its_products(flags: set[str], kind: str) -> None:
    assert instructions(flags) == kind
