"""The counted memory: the arena as it is allocated, scratch that grows with the batch."""

import dataclasses

import pytest

from nsp.benchmarks.contest.rounds import Runner
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.footprint import arena_bytes, scratch_floats, var_footprint
from nsp.benchmarks.record.result import BenchResult
from nsp.benchmarks.render.tables import sections
from nsp.families.var.config import size
from nsp.families.var.loop import cache
from nsp.stage.arena import KVShape

W512 = KVShape(num_layers=8, num_tokens=680, rows=2, num_heads=8, head_width=64, dtype="float32")


def test_the_arena_counts_every_buffer_of_its_layout() -> None:
    cache = 2 * 8 * 680 * 2 * 8 * 64 * 4
    assert arena_bytes("delta", W512) == cache
    assert arena_bytes("present", W512) == 2 * cache  # past and present take turns


def test_the_widest_moment_of_a_step_holds_its_logits_and_the_decoder_its_finest_level() -> None:
    config = size("w512")
    last = scratch_floats(config, "step", {"G": 2, "L": 256, "P": 424})
    assert last > 2 * 256 * 4096
    assert last >= 2 * 8 * 256 * 680  # the attention's scores
    assert scratch_floats(config, "step", {"G": 4, "L": 256, "P": 424}) == 2 * last
    assert scratch_floats(config, "decoder", {"B": 1}) == 4 * 64 * 64**2


def test_the_report_holds_the_peak_against_what_was_counted(
    result: BenchResult, subject: Subject
) -> None:
    found = result.footprint
    assert found is not None
    pipeline = subject.contender.pipeline
    calls = Runner("a", pipeline).play(subject.request(1, 0)).calls
    rows = max(call.sizes.get("G", 0) for call in calls)
    again = var_footprint(
        pipeline.config,
        calls,
        weights_mib=1.0,
        kv_layout="present",
        kv_shape=cache(pipeline.config, rows, "float32"),
    )
    assert again == found
    assert found.total_mib == pytest.approx(1 + found.arena_mib + found.scratch_mib)
    (run,) = result.cold_runs
    ours = dataclasses.replace(
        run, contender="engines", imported_mib=100.0, peak_mib=100 + 2 * found.total_mib
    )
    told = dataclasses.replace(result, cold_runs=(ours,))
    (section,) = [each for each in sections(told) if "counted" in each.title]
    assert section.rows[-1] == ("measured over counted", "+100 %")
