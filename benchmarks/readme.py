"""`python -m nsp.benchmarks.readme` writes the README's tables of measurements from results.

To measure again: run `nsp bench` as the text beside a table says, copy its bench.json over the
result, and run this.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.benchmarks.next_scale import growth_table, read_growth
from nsp.benchmarks.record.result import BatchResult, BenchResult, Row, read_result
from nsp.benchmarks.render.contest_tables import step_section
from nsp.benchmarks.render.report import table_lines, write_text
from nsp.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]  # of the checkout: its folder is linked into nsp/
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"


def step_loop(result: BenchResult) -> str:
    """Return what everybody makes of the scale steps, as Markdown."""
    model, environment = result.model, result.environment
    section = step_section(result)
    lines = [
        f"The step loop of a larger model with random weights (`w512`: width 512, 8 layers, "
        f"{model.num_tokens} tokens in {len(model.schedule)} scales, {model.image_size_px} px, "
        f"guidance on), `nsp bench` on {environment.threads} cores of an {environment.cpu}, all in "
        "the same rounds:",
        "",
        *table_lines(section),
        *(line for note in section.notes for line in ("", note)),
    ]
    return "\n".join(lines)


def measured(result: BenchResult) -> str:
    """Return the times of the bundled model beside PyTorch's, as Markdown."""
    model, environment = result.model, result.environment
    packages = environment.packages
    assert result.baseline is not None
    assert result.parity is not None
    command = "nsp bench --quick" if result.options.get("quick") else "nsp bench"
    lines = [
        f"The bundled text-to-image model ({model.image_size_px} px, {model.num_tokens} tokens in "
        f"{len(model.schedule)} scale steps, guidance on, {model.precision}), `{command}` on",
        f"{environment.threads} cores of an {environment.cpu}, ONNX Runtime "
        f"{packages['onnxruntime']} against PyTorch {packages['torch'].partition('+')[0]} eager, "
        "interleaved rounds, medians:",
        "",
        "| | engines | PyTorch | ratio |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(cells)} |" for cells in _rows(result)),
    ]
    if result.ceilings is not None:
        lines += [
            "",
            f"The machine's own speed varied by {100 * result.ceilings.drift:.0f} % during that "
            "run: read the ratios, not the milliseconds.",
        ]
    return "\n".join(lines)


def _rows(result: BenchResult) -> Iterator[tuple[str, str, str, str]]:
    """Yield the table's rows."""
    for batch in result.batches:
        alone = batch.batch == 1
        name = "one image, prompt to pixels" if alone else f"{batch.batch} images at once"
        yield _time_row(result, name, batch.end_to_end)
        if alone:
            name = f"of it the {len(batch.scale_rows)} scale steps"
            yield _time_row(result, name, _stage(batch, "step"))
    ours, theirs = (_cold(result, side, "first_step_ms") for side in _sides(result))
    ratio = f"{theirs / ours:.0f}x"
    yield (
        "new process to the first scale step",
        f"{ours / 1e3:.2g} s",
        f"{theirs / 1e3:.2g} s",
        ratio,
    )
    ours, theirs = (_cold(result, side, "peak_mib") for side in _sides(result))
    yield "peak memory", f"{ours:.0f} MiB", f"{theirs:.0f} MiB", f"{ours / theirs:.2f}x"
    parity = result.parity
    assert parity is not None
    tokens = min(parity.token_agreement, parity.free_token_agreement)
    name = "sampled tokens equal to PyTorch's, teacher-forced and free-running"
    yield name, "100 %" if tokens == 1 else f"{min(100 * tokens, 99.99):.2f} %", "", ""
    yield (
        "largest logit error over its range",
        f"{parity.max_relative_error:.0e}".replace("e-0", "e-"),
        "",
        "",
    )


def _time_row(result: BenchResult, name: str, row: Row) -> tuple[str, str, str, str]:
    assert row.baseline is not None
    reached = row.of_roof(result.ceilings)
    share = "" if reached is None else f" ({100 * reached:.0f} % of the GEMM peak)"
    ours, theirs = row.candidate.p50, row.baseline.p50
    return name, f"{ours:.0f} ms{share}", f"{theirs:.0f} ms", f"{theirs / ours:.2f}x"


def _stage(batch: BatchResult, name: str) -> Row:
    return next(row for row in batch.rows if row.name == name)


def _sides(result: BenchResult) -> tuple[str, str]:
    assert result.baseline is not None
    return result.candidate, result.baseline


def _cold(result: BenchResult, side: str, field: str) -> float:
    runs = [run for run in result.cold_runs if run.contestant == side]
    return float(statistics.median(getattr(run, field) for run in runs))


@dataclass(frozen=True)
class Source:
    """How a committed result is read, and what the README says about it."""

    read: Callable[[Path], Any]
    text: Callable[[Any], str]


# Between `begin(name)` and END.
SECTIONS: Mapping[str, Source] = {
    "emoji_cpu.json": Source(read_result, measured),
    "w512_cpu.json": Source(read_result, step_loop),
    "next_scale_1024_cpu.json": Source(read_growth, growth_table),
}


def begin(name: str) -> str:
    """Return the mark before the section of a result."""
    return f"<!-- from benchmarks/results/{name} by: python -m nsp.benchmarks.readme -->"


def rewritten(readme: str, results: Mapping[str, Any]) -> str:
    """Return the README with the sections of `results`; raise ConfigError without their marks."""
    for name, result in results.items():
        before, mark, rest = readme.partition(begin(name))
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise ConfigError(f"README.md does not have the marks {begin(name)} and {END}")
        readme = f"{before}{mark}\n\n{SECTIONS[name].text(result)}\n\n{end}{after}"
    return readme


def committed() -> dict[str, Any]:
    """Return the results the README tells of."""
    return {name: source.read(RESULTS / name) for name, source in SECTIONS.items()}


def main() -> None:
    """Write the README again."""
    path = ROOT / "README.md"
    write_text(path, rewritten(path.read_text(encoding="utf-8"), committed()))


if __name__ == "__main__":
    main()
