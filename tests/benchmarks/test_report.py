import dataclasses
import io
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nsp.benchmarks.ceilings.product import GEMM
from nsp.benchmarks.contest import measure as bench
from nsp.benchmarks.contest.measure import Bench, BenchEvent, run
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.options import BenchOptions, Effort
from nsp.benchmarks.record.doubts import doubts
from nsp.benchmarks.record.result import BenchResult
from nsp.benchmarks.render.contender_tables import steps_section
from nsp.benchmarks.render.report import markdown, write_report
from nsp.benchmarks.render.tables import sections
from nsp.distribution import pip_install
from nsp.errors import ConfigError
from tests.benchmarks.conftest import SMALL


@pytest.fixture(autouse=True)
def drawn_elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing of the page, two seconds each, to its own tests."""
    if "packages" not in request.node.name:
        monkeypatch.setattr(
            "nsp.benchmarks.render.report.page", lambda result, pictures: "drawn elsewhere"
        )


def test_a_small_benchmark_measures_everything(result: BenchResult, subject: Subject) -> None:
    stages = ["text_encoder", "condition", "step", "select", "accumulate", "decoder"]
    config = subject.contender.pipeline.config
    assert [batch.batch for batch in result.batches] == [1, 2]
    for batch in result.batches:
        names = [row.name for row in batch.rows]
        assert names == [*stages, "outside stages", "end to end"]
        assert [row.name for row in batch.step_rows] == [f"{n}x{n}" for n in config.patch_nums]
        assert len(batch.observations) == 3 * (SMALL.rounds + SMALL.warmup)  # the product, too
        assert all(row.baseline is not None for row in batch.rows)
        assert batch.end_to_end.cost is not None
    assert result.parity is not None
    assert result.parity.token_agreement == 1
    assert result.ceilings is not None
    assert len(result.ceilings.copy_gb_s) == 2  # before and after
    assert result.model.schedule == config.patch_nums
    assert result.baseline_missing is None


def test_progress_of_every_activity_is_told(result: BenchResult, events: list[BenchEvent]) -> None:
    assert list(dict.fromkeys(event.activity for event in events)) == [
        "ceilings",
        "parity",
        "batch 1",
        "batch 2",
        "fresh processes",
    ]
    done = [event.done for event in events if event.activity == "batch 1"]
    assert done == list(range(1, 3 * (SMALL.rounds + SMALL.warmup) + 1))


def test_steps_are_held_against_the_product_of_their_own_round(result: BenchResult) -> None:
    assert result.ceilings is not None
    batch = result.batches[0]
    steps = batch.loop
    assert steps is not None
    assert steps.cost is not None
    loops, products = batch.times(result.contender, batch.loop_ms), batch.times(GEMM)
    work = steps.cost.gflop / (2e-9 * result.ceilings.gemm_side**3)
    shares = [work * product / loop for loop, product in zip(loops, products, strict=True)]
    section = steps_section(result)
    cell = section.rows[0][section.header.index("of GEMM beside it")]
    assert cell == f"{100 * statistics.median(shares):.0f} %"


def test_json_on_disk_is_the_result_and_holds_no_nan(result: BenchResult, tmp_path: Path) -> None:
    report = write_report(result, tmp_path / "new" / "folder")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads(report.json_path.read_text(), parse_constant=refuse)
    assert values["schema_version"] == 4
    assert BenchResult.from_dict(values) == result


def test_another_schema_is_refused(result: BenchResult) -> None:
    with pytest.raises(ConfigError, match="schema_version 5"):
        BenchResult.from_dict({**result.to_dict(), "schema_version": 5})


def test_markdown_holds_every_row_of_every_table(result: BenchResult) -> None:
    lines = markdown(result).splitlines()
    tables = list(sections(result))
    assert len(tables) >= 8
    for section in tables:
        assert f"## {section.title}" in lines
        for row in section.rows:
            assert "| " + " | ".join(row) + " |" in lines
            assert len(row) == len(section.header)
        for note in section.notes:
            assert note in lines


def test_the_screen_shows_every_table(result: BenchResult, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    write_report(result, tmp_path).render(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for section in sections(result):
        assert section.title in shown
        for row in section.rows:
            assert row[0] in shown


def test_the_summary_is_one_json_line_that_leads_to_the_files(
    result: BenchResult, tmp_path: Path
) -> None:
    report = write_report(result, tmp_path)
    line = report.summary_json()
    assert "\n" not in line
    values = json.loads(line)
    assert Path(values["json"]).is_file()
    assert Path(values["markdown"]).is_file()
    assert [batch["batch"] for batch in values["batches"]] == [1, 2]
    assert values["batches"][0]["p50_ms"] == result.batches[0].end_to_end.contender.p50
    assert values["token_agreement"] == 1


def test_a_missing_baseline_is_said_with_its_reason(subject: Subject, tmp_path: Path) -> None:
    alone = dataclasses.replace(subject, baseline=None, baseline_missing="torch is not installed")
    effort = dataclasses.replace(SMALL, rounds=1, baseline_processes=0)
    options = BenchOptions(engine_dir=tmp_path, output_dir=tmp_path, batch_sizes=(1,), quick=True)
    found = Bench(options, effort, 1, lambda event: None).measure(alone)
    assert found.baseline is None
    assert found.parity is None
    assert "No PyTorch baseline: torch is not installed" in markdown(found)
    values = json.loads(write_report(found, tmp_path).summary_json())
    assert values["baseline_missing"] == "torch is not installed"
    assert values["batches"][0]["speedup"] is None
    assert BenchResult.from_dict(json.loads((tmp_path / "bench.json").read_text())) == found


def test_what_the_engines_do_not_take_is_refused_before_anything_is_measured(
    subject: Subject, tmp_path: Path
) -> None:
    limited = dataclasses.replace(subject)
    events: list[BenchEvent] = []
    limited.contender.pipeline.max_batch = 2
    try:
        options = BenchOptions(engine_dir=tmp_path, output_dir=tmp_path, batch_sizes=(1, 3))
        with pytest.raises(ConfigError, match=r"batch size 3 is outside the engine's 1\.\.2"):
            Bench(options, SMALL, 1, events.append).measure(limited)
    finally:
        limited.contender.pipeline.max_batch = None
    assert events == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": ()}, "batch sizes"),
        ({"batch_sizes": (0,)}, "batch sizes"),
        ({"rounds": 0}, "rounds is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(engine_dir=Path(), output_dir=Path(), **changes)  # type: ignore[arg-type]


def test_given_rounds_and_warm_up_win_over_quick() -> None:
    options = BenchOptions(engine_dir=Path(), output_dir=Path(), quick=True, rounds=7, warmup=0)
    effort = Effort.of(options)
    assert (effort.rounds, effort.warmup) == (7, 0)
    assert effort.seconds_per_batch < 20


def test_run_writes_its_files_only_once_everything_is_measured(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    monkeypatch.setattr(bench, "load_subject", lambda *args, **kwargs: subject)
    monkeypatch.setattr(Effort, "of", lambda options: dataclasses.replace(SMALL, rounds=1))

    def stop(event: BenchEvent) -> None:
        if event.activity == "batch 2":
            raise KeyboardInterrupt

    options = BenchOptions(
        engine_dir=tmp_path, output_dir=folder, batch_sizes=(1, 2), threads=1, quick=True
    )
    with pytest.raises(KeyboardInterrupt):
        run(options, on_event=stop)
    assert not folder.exists()
    monkeypatch.setattr(Bench, "_cold_runs", lambda *args: ())
    report = run(options)
    assert sorted(path.name for path in folder.iterdir()) == [
        "bench.html",
        "bench.json",
        "bench.md",
    ]
    assert report.result.options["batch_sizes"] == [1, 2]
    assert report.result.options["rounds"] == 1


def test_without_the_packages_that_draw_it_the_page_is_left_out_with_a_warning(
    result: BenchResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    report = write_report(result, tmp_path)
    assert report.page_path is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    assert pip_install("bench") in caplog.text


def test_results_tell_no_folder_of_the_machine(result: BenchResult) -> None:
    text = json.dumps(result.to_dict())
    assert result.options["output_dir"].startswith("bench")
    assert str(Path.home()) not in text
    assert "/tmp" not in text


def test_warnings_come_before_all_numbers(result: BenchResult) -> None:
    doubtful = dataclasses.replace(result, warnings=("the machine was busy",))
    assert next(sections(doubtful)).rows == (("the machine was busy",),)
    calm = dataclasses.replace(result, warnings=())
    assert "Warnings" not in [section.title for section in sections(calm)]


def test_a_run_that_is_not_trusted_says_so_and_tells_no_ratio(
    result: BenchResult, tmp_path: Path
) -> None:
    """Seen: eager PyTorch at a tenth of its speed beside another process, told as 18 times."""
    doubted = dataclasses.replace(result, warnings=("others were at work",), trusted=False)
    report = write_report(doubted, tmp_path)
    summary = json.loads(report.summary_json())
    assert summary["trusted"] is False
    assert {batch["speedup"] for batch in summary["batches"]} == {None}
    assert json.loads(report.json_path.read_text())["trusted"] is False
    text = markdown(doubted)
    assert text.splitlines()[2].endswith("; not trusted, so no ratio.")
    assert not re.search(r"\d\.\d\dx|\d×", text)
    calm = markdown(dataclasses.replace(result, warnings=(), trusted=True))
    assert f"{result.batches[0].end_to_end.speedup:.2f}× as fast as torch" in calm.splitlines()[2]


def test_doubts_are_about_others_a_falling_clock_and_unsteady_times(result: BenchResult) -> None:
    assert result.ceilings is not None
    machine = dataclasses.replace(result.environment, logical_cores=4)
    busy = list(doubts(machine, 0.5, None, ()))
    assert "kept 0.5 of 4 cores busy" in busy[0]
    assert list(doubts(machine, 0.3, None, ())) == []
    fell = dataclasses.replace(
        result.ceilings, gemm_gflops={"numpy": (100.0, 80.0)}, copy_gb_s=(1.0,)
    )
    assert "changed by 20 %" in next(doubts(machine, 0.0, fell, ()))
    fast = dataclasses.replace(result.ceilings, gemm_gflops={"numpy": (1e9,)})
    slowed = list(doubts(machine, 0.0, fast, result.batches))
    assert any("the large product of every round ran at 0 %" in text for text in slowed)
