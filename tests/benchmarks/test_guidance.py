"""Guidance ended early: what it saves and changes, measured against guidance on all scales."""

import copy
import dataclasses
import json

import pytest

from nsp.benchmarks.contest.guidance import LAST_SCALES, NUM_PICTURES, guidance_sweep
from nsp.benchmarks.contest.subject import Subject
from nsp.benchmarks.record.result import BenchResult, GuidancePoint
from nsp.benchmarks.render.plots import plots
from nsp.benchmarks.render.report import markdown
from nsp.benchmarks.render.tables import sections
from nsp.pipeline.pipeline import Pipeline


def measured(pipeline: Pipeline, subject: Subject) -> list[GuidancePoint]:
    return list(guidance_sweep(pipeline, subject.conditions, rounds=2, seconds=60, seed=3))


@pytest.fixture(scope="module")
def points(subject: Subject) -> list[GuidancePoint]:
    return measured(subject.contender.pipeline, subject)


def test_full_guidance_is_the_measure_and_ever_fewer_scales_follow(
    points: list[GuidancePoint], subject: Subject
) -> None:
    count = subject.contender.pipeline.config.num_scales
    assert [point.guided_scales for point in points] == [*range(count, -1, -1)][: LAST_SCALES + 1]
    full, *others = points
    assert full.token_agreement == 1
    assert full.psnr_db == (None,) * NUM_PICTURES
    assert all(len(point.times_ms) == 2 and min(point.times_ms) > 0 for point in points)
    shares = [point.token_agreement for point in points]
    assert shares == sorted(shares, reverse=True)
    # Scales before the end of guidance are what they were.
    config = subject.contender.pipeline.config
    kept = config.num_tokens - config.patch_nums[-1] ** 2
    assert kept / config.num_tokens <= others[0].token_agreement < 1


def test_a_model_without_guidance_has_nothing_to_end(subject: Subject) -> None:
    pipeline = copy.copy(subject.contender.pipeline)
    pipeline.sampling = pipeline.sampling.changed({"guidance_scale": 1.0})
    assert measured(pipeline, subject) == []


def test_the_report_tells_time_tokens_and_pictures(
    result: BenchResult, points: list[GuidancePoint]
) -> None:
    found = dataclasses.replace(result, guidance=tuple(points))
    assert BenchResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    (section,) = [each for each in sections(found) if each.topic == "guidance"]
    assert [row[0] for row in section.rows] == [str(point.guided_scales) for point in points]
    assert section.rows[0][3:] == ("100 %", "identical", "identical")
    assert section.rows[-1][5].endswith(" dB")
    assert "## Guidance ended early" in markdown(found)
    (plot,) = [each for each in plots(found) if each.key == "guidance"]
    assert "of the tokens stay" in plot.summary


def test_a_half_of_pictures_that_differ_is_not_called_identical(result: BenchResult) -> None:
    full = GuidancePoint(
        guided_scales=2, times_ms=(2.0, 2.0), token_agreement=1.0, psnr_db=(None,) * 4
    )
    half = dataclasses.replace(
        full, guided_scales=1, times_ms=(1.0, 1.0), psnr_db=(None, 20.0, None, 30.0)
    )
    found = dataclasses.replace(result, trusted=True, guidance=(full, half))
    (section,) = [each for each in sections(found) if each.topic == "guidance"]
    assert section.rows[1][2] == "2.00x"
    assert section.rows[1][4:] == ("30.0 dB", "20.0 dB")
