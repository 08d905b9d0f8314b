"""What a benchmark leaves: tables on the screen, bench.{html,md,json}; JSON in one line."""

import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsp.benchmarks.contest.pictures import Pictures
from nsp.benchmarks.record.result import JSON_NAME, BatchResult, BenchResult
from nsp.benchmarks.render.headline import one_line
from nsp.benchmarks.render.page import page
from nsp.benchmarks.render.section import Section
from nsp.benchmarks.render.tables import sections
from nsp.errors import MissingExtraError
from nsp.files import write_file

logger = logging.getLogger(__name__)

MARKDOWN_NAME, PAGE_NAME = "bench.md", "bench.html"


@dataclass(frozen=True)
class BenchReport:
    """A result and where it was written."""

    result: BenchResult
    json_path: Path
    markdown_path: Path
    page_path: Path | None  # None: a package that draws it is missing

    def render(self, console: Console) -> None:
        """Print the tables, and what matters most in the last line."""
        render(sections(self.result), console)
        console.print(Text(one_line(self.result), style="bold"))

    def summary_json(self) -> str:
        """Return one JSON line for programs: the end-to-end figures of every batch size."""
        return json.dumps(summary(self), allow_nan=False)


def render(tables: Iterable[Section], console: Console) -> None:
    """Print tables with their notes."""
    for section in tables:
        table = Table(title=section.title, title_justify="left", title_style="bold", box=None)
        for index, name in enumerate(section.header):
            right = index > 0 and section.numbers
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for note in section.notes:
            console.print(Text(note, style="dim"))
        console.print()


def summary(report: BenchReport) -> dict[str, Any]:
    """Return the end-to-end figures, JSON-ready."""
    result, parity = report.result, report.result.parity
    cold = [run for run in result.cold_runs if run.contender == result.contender]
    return {
        "command": "bench",
        "schema_version": result.schema_version,
        "backend": result.model.backend,
        "precision": result.model.precision,
        "model_hash": result.model.model_hash,
        "batches": [_batch_summary(result, batch) for batch in result.batches],
        "trusted": result.trusted,
        "token_agreement": parity.token_agreement if parity else None,
        "max_relative_error": parity.max_relative_error if parity else None,
        "baseline": result.baseline,
        "baseline_missing": result.baseline_missing,
        "cold_first_step_ms": _median([run.first_step_ms for run in cold]),
        "cold_image_ms": _median([run.image_ms for run in cold]),
        "peak_mib": _median([run.peak_mib for run in cold]),
        "warnings": list(result.warnings),
        "json": str(report.json_path),
        "markdown": str(report.markdown_path),
        "page": str(report.page_path) if report.page_path else None,
    }


def _batch_summary(result: BenchResult, batch: BatchResult) -> dict[str, Any]:
    row = batch.end_to_end
    return {
        "batch": batch.batch,
        "p50_ms": row.contender.p50,
        "p90_ms": row.contender.p90,
        "p99_ms": row.contender.p99,
        "images_per_s": batch.images_per_s,
        "baseline_p50_ms": row.baseline.p50 if row.baseline else None,
        "speedup": row.speedup if result.trusted else None,  # told of trusted runs only
        "of_gemm_roof": row.of_roof(result.ceilings) if result.trusted else None,
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def write_report(
    result: BenchResult, output_dir: Path, *, pictures: Pictures | None = None
) -> BenchReport:
    """Write bench.json, bench.md and bench.html into `output_dir`, each in one move.

    The page is left out, with a warning, where the packages of the extra `bench` are missing.
    """
    write_text(output_dir / JSON_NAME, json.dumps(result.to_dict(), allow_nan=False) + "\n")
    write_text(output_dir / MARKDOWN_NAME, markdown(result))
    page_path: Path | None = output_dir / PAGE_NAME
    try:
        write_text(output_dir / PAGE_NAME, page(result, pictures))
    except MissingExtraError as error:
        logger.warning("no %s: %s", PAGE_NAME, error)
        page_path = None
    return BenchReport(result, output_dir / JSON_NAME, output_dir / MARKDOWN_NAME, page_path)


def write_text(path: Path, text: str) -> None:
    """Write a file in one move."""
    with write_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def markdown(result: BenchResult) -> str:
    """Return all sections as GitHub-flavoured Markdown."""
    lines = ["# nsp bench", "", f"{one_line(result)}.", ""]
    for section in sections(result):
        lines += [f"## {section.title}", "", *table_lines(section)]
        lines += [line for note in section.notes for line in ("", note)]
        lines.append("")
    return "\n".join(lines)


def table_lines(section: Section) -> list[str]:
    """Return the lines of a section's table as Markdown."""
    rule = " ---: |" if section.numbers else " --- |"
    return [
        "| " + " | ".join(section.header) + " |",
        "| --- |" + rule * (len(section.header) - 1),
        *("| " + " | ".join(map(_escaped, row)) + " |" for row in section.rows),
    ]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
