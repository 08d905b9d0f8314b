"""The counted memory: the arena as it is allocated, scratch of every stage that is called."""

import dataclasses

import pytest

from nsp.benchmarks.contest.rounds import Runner
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.costs import arena_bytes, footprint
from nsp.benchmarks.record.result import BenchResult
from nsp.benchmarks.render.tables import sections
from nsp.stage.arena import KVShape

W512 = KVShape(num_layers=8, num_tokens=680, rows=2, num_heads=8, head_width=64, dtype="float32")


def test_the_arena_counts_every_buffer_of_its_layout() -> None:
    cache = 2 * 8 * 680 * 2 * 8 * 64 * 4
    assert arena_bytes("delta", W512) == cache
    assert arena_bytes("present", W512) == 2 * cache  # past and present take turns


def test_scratch_is_that_of_all_stages_that_are_called(subject: Subject) -> None:
    pipeline = subject.contender.pipeline
    calls = Runner("a", pipeline).play(subject.request(1, 0)).calls
    found = footprint(subject.costs, pipeline, calls, weights_mib=1.0)
    assert found is not None
    called = {call.stage for call in calls}
    scratch = sum(subject.costs[stage].scratch for stage in called)
    assert scratch < found.scratch_mib * 2**20 < 2 * scratch  # and their outputs
    assert footprint({}, pipeline, calls, weights_mib=1.0) is None


def test_the_report_holds_the_peak_against_what_was_counted(result: BenchResult) -> None:
    found = result.footprint
    assert found is not None
    assert found.total_mib == pytest.approx(1 + found.arena_mib + found.scratch_mib)
    (run,) = result.cold_runs
    ours = dataclasses.replace(
        run, contender="engines", imported_mib=100.0, peak_mib=100 + 2 * found.total_mib
    )
    told = dataclasses.replace(result, cold_runs=(ours,))
    (section,) = [each for each in sections(told) if "counted" in each.title]
    assert section.rows[-1] == ("measured over counted", "+100 %")
