"""bench.html: the whole result on one page that needs no network, no script and no other file."""

import base64
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nsp.benchmarks.contest.pictures import Pictures
from nsp.benchmarks.record.result import BenchResult
from nsp.benchmarks.render.headline import Tile, headline
from nsp.benchmarks.render.plots import plots
from nsp.benchmarks.render.section import Section, ms
from nsp.benchmarks.render.svg import COLORS, Plot
from nsp.benchmarks.render.tables import sections
from nsp.errors import MissingExtraError

TEMPLATE = Path(__file__).with_name("report.html.j2")
_PIXELATED_PX = 128  # pictures up to here are shown with their pixels, not smoothed

# Part of the page -> its title, the plots and the topics of the tables that belong there.
_PARTS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("latency", "Latency", ("waterfall", "speedups"), ("latency", "contenders")),
    ("ceilings", "Ceilings", ("roofline",), ("steps",)),
    ("parity", "Parity", ("parity", "flips"), ("parity",)),
    ("pictures", "Pictures", (), ()),
    (
        "growth",
        "How cost grows",
        ("tokens", "batches", "threads", "guidance"),
        ("sweep", "guidance"),
    ),
    ("memory", "Memory and start", ("memory",), ("memory",)),
    ("environment", "Environment", (), ("environment",)),
)


@dataclass(frozen=True)
class Table:
    """A section of the tables as the template wants it."""

    key: str
    section: Section
    is_open: bool = False

    def __getattr__(self, name: str) -> Any:
        """Return the section's field."""
        return getattr(self.section, name)

    @cached_property
    def has_header(self) -> bool:
        """Whether any column has a name."""
        return any(self.section.header)


@dataclass
class Part:
    """One chapter of the page."""

    key: str
    title: str
    texts: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.plots or self.tables or self.pictures)


def page(result: BenchResult, pictures: Pictures | None) -> str:
    """Return the page as HTML; raise MissingExtraError without Jinja or Matplotlib."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise MissingExtraError("jinja2", "bench") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    model = result.model
    subject = f"{model.backend} {model.precision}"
    kind = f" ({kind})" if (kind := result.environment.instructions) else ""
    against = f" against {result.baseline}" if result.baseline else ""
    return template.render(
        colors=COLORS,
        title=f"{subject}{against}",
        subtitle=(
            f"{model.family} {model.model_hash[:12]}, {model.image_size_px} px, "
            f"{model.schedule_words}. "
            f"{result.environment.cpu}{kind}, {result.environment.threads} thread(s). "
            f"{result.created[:16].replace('T', ' ')} UTC"
        ),
        warnings=result.warnings,
        headline=list(headline(result)),
        tiles=list(_more_tiles(result)),
        parts=list(_parts(result, pictures)),
    )


def _more_tiles(result: BenchResult) -> Iterator[Tile]:
    """Yield the figures that come after the first screen."""
    for batch in result.batches[1:]:
        row = batch.end_to_end
        beside = f"p90 {ms(row.contender.p90)} ms"
        if row.baseline is not None:
            beside = f"{result.baseline} {ms(row.baseline.p50)} ms"
            if result.trusted and row.speedup is not None:
                beside = f"{row.speedup:.2f}× as fast as {result.baseline}"
        yield Tile(f"{batch.batch} images at once", f"{ms(row.contender.p50)} ms", beside)
    loop = result.batches[0].loop
    share = None if loop is None else loop.of_roof(result.ceilings)
    if result.trusted and loop is not None and share is not None:
        ratio = f"{loop.speedup:.2f}× as fast as {result.baseline}" if loop.speedup else ""
        yield Tile("all steps, of the GEMM peak", f"{100 * share:.0f} %", ratio)
    cold = [run for run in result.cold_runs if run.contender == result.contender]
    if cold:
        first = statistics.median(run.first_step_ms for run in cold)
        peak = statistics.median(run.peak_mib for run in cold)
        yield Tile("new process to the first step", f"{first / 1e3:.2f} s")
        yield Tile("peak memory", f"{peak:.0f} MiB", "libraries included")


def _parts(result: BenchResult, pictures: Pictures | None) -> Iterator[Part]:
    """Yield the chapters that have something to show."""
    drawn = {plot.key: plot for plot in plots(result)}
    tables = [
        Table(f"table-{number}", section)
        for number, section in enumerate(sections(result))
        if section.topic != "warnings"
    ]
    for key, title, names, topics in _PARTS:
        part = Part(key, title, plots=[drawn[name] for name in names if name in drawn])
        part.tables = [table for table in tables if table.section.topic in topics]
        if key == "environment":
            part.tables = [Table(t.key, t.section, is_open=True) for t in part.tables]
        if key == "pictures" and pictures is not None:
            part.pictures = list(_cards(pictures))
            part.texts.append(
                f"The same prompts and seeds, each side with its own tokens. Differences are shown "
                f"{pictures.gain} times as large as they are."
            )
        if key == "latency":
            part.texts += _latency_texts(result)
        if not part.is_empty:
            yield part


def _latency_texts(result: BenchResult) -> list[str]:
    stops = {"rounds": "all rounds", "stable": "until no median moved", "time": "until time was up"}
    texts = [
        f"Batch {batch.batch}: {batch.rounds} interleaved rounds, {stops[batch.stopped]}."
        for batch in result.batches
    ]
    texts += [f"{e.name} is missing: {e.missing}" for e in result.others if e.missing]
    return [" ".join(texts)]


def _cards(pictures: Pictures) -> Iterator[dict[str, Any]]:
    """Yield a card per prompt: both pictures, their difference, and what it measures."""
    rows: Sequence[tuple[str, NDArray[np.uint8]]] = (
        (pictures.baseline, pictures.expected),
        (pictures.contender, pictures.found),
        ("difference", pictures.difference),
    )
    for index, caption in enumerate(pictures.captions):
        psnr, largest = pictures.psnr_db(index), pictures.largest_error(index)
        note = "Identical pixels."
        if psnr is not None:
            note = f"PSNR {psnr:.1f} dB, largest difference {largest} of 255."
        images = []
        for label, pixels in rows:
            side = pixels.shape[1]
            images.append(
                {
                    "src": _data_uri(pixels[index]),
                    "side": side,
                    "label": label,
                    "alt": f"{caption}: {label}",
                    "pixels": side <= _PIXELATED_PX,
                }
            )
        yield {"caption": caption, "images": images, "note": note}


def _data_uri(pixels_HW3: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
