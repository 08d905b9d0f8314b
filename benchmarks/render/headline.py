"""What a reader wants first: how long, how much faster, how exact, and whether to trust it."""

from collections.abc import Iterator
from dataclasses import dataclass

from nsp.benchmarks.record.parity import Parity
from nsp.benchmarks.record.result import BatchResult, BenchResult
from nsp.benchmarks.render.section import db, ms, percent


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    beside: str = ""
    is_alert: bool = False


def headline(result: BenchResult) -> Iterator[Tile]:
    """Yield the four figures of the first screen; ratios only of a run that is trusted."""
    batch = result.batches[0]
    yield _time(result, batch)
    yield _speed(result, batch)
    yield exactness(result.parity)
    if result.trusted:
        yield Tile("can this run be trusted?", "yes", "idle machine, steady speed and times")
    else:
        count = len(result.warnings)
        reasons = "for the reason below" if count == 1 else f"for {count} reasons below"
        yield Tile("can this run be trusted?", "no", reasons, is_alert=True)


def _time(result: BenchResult, batch: BatchResult) -> Tile:
    """Return the time of one picture, at the first batch size."""
    each = batch.end_to_end.contender.p50 / batch.batch
    at_once = "" if batch.batch == 1 else f", {batch.batch} at once"
    beside = f"p90 {ms(batch.end_to_end.contender.p90 / batch.batch)} ms"
    return Tile(f"per picture, {result.contender}{at_once}", f"{ms(each)} ms", beside)


def _speed(result: BenchResult, batch: BatchResult) -> Tile:
    """Return how many times as fast as the baseline it is."""
    row = batch.end_to_end
    if row.baseline is None or row.speedup is None:
        return Tile("beside a baseline", "not measured", result.baseline_missing or "")
    beside = f"{result.baseline}: {ms(row.baseline.p50 / batch.batch)} ms per picture"
    if not result.trusted:
        return Tile(f"times as fast as {result.baseline}", "no ratio", "this run is not trusted")
    return Tile(f"times as fast as {result.baseline}", f"{row.speedup:.2f}×", beside)


def exactness(parity: Parity | None) -> Tile:
    """Return the share of equal tokens, or the largest error where none are drawn."""
    if parity is None:
        return Tile("equal to the baseline", "not measured", "there is no baseline")
    picture = f"picture {db(parity.forced_psnr_db)}"
    error = f"largest error {parity.max_relative_error:.1e} of the range"
    shares = (parity.token_agreement, parity.free_token_agreement)
    share = next((each for each in shares if each is not None), None)
    if share is None:
        label = f"largest error of the latents over their range, against {parity.baseline}"
        return Tile(label, f"{parity.max_relative_error:.1e}", picture)
    return Tile(f"tokens equal to those of {parity.baseline}", percent(share), error)


def one_line(result: BenchResult) -> str:
    """Return the headline as one line of text: the last one of the command's output."""
    batch = result.batches[0]
    row, parts = (
        batch.end_to_end,
        [f"{ms(batch.end_to_end.contender.p50 / batch.batch)} ms a picture"],
    )
    if result.trusted and row.speedup is not None:
        parts.append(f"{row.speedup:.2f}× as fast as {result.baseline}")
    if result.parity is not None:
        tile = exactness(result.parity)
        parts.append(f"{tile.label}: {tile.value}")
    parts.append("trusted" if result.trusted else "not trusted, so no ratio")
    return "; ".join(parts)
