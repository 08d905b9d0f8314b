"""`python -m nsp.benchmarks.readme` writes the README's tables of measurements from results.

To measure again: run `nsp bench` as the text beside a table says, copy its bench.json over the
result, and run this.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.benchmarks.record.result import BenchResult, Row, read_result
from nsp.benchmarks.render.contender_tables import steps_section
from nsp.benchmarks.render.report import table_lines, write_text
from nsp.benchmarks.render.section import percent
from nsp.errors import ConfigError
from nsp.export.size_table import read_sizes, size_table

ROOT = Path(__file__).resolve().parents[1]  # of the checkout: its folder is linked into nsp/
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"


def steps(result: BenchResult) -> str:
    """Return what everybody makes of the scale steps, as Markdown."""
    model, environment = result.model, result.environment
    section, is_raster = steps_section(result), len(model.schedule) == 1
    tokens = f"{model.num_tokens} tokens in {len(model.schedule)} scales"
    if is_raster:
        tokens = f"{model.num_tokens} codes one after the other"
    lines = [
        f"All steps of a larger model of family `{model.family}` with random weights (`w512`: "
        f"width 512, 8 layers, {tokens}, {model.image_size_px} px, guidance on), `nsp bench` on "
        f"{environment.threads} cores of an {environment.cpu}, all in the same rounds:",
        "",
        *table_lines(section),
        *(line for note in section.notes for line in ("", note)),
        *(("", _per_code(result)) if is_raster else ()),
    ]
    return "\n".join(lines)


def _per_code(result: BenchResult) -> str:
    """Return the times of one code in words."""
    (loop,) = (batch.loop for batch in result.batches if batch.batch == 1)
    assert loop is not None
    assert loop.baseline is not None
    ours, theirs = (row.p50 / result.model.num_tokens for row in (loop.contender, loop.baseline))
    return f"A code takes {ours:.1f} ms, and PyTorch {theirs:.1f} ms."


def measured(result: BenchResult) -> str:
    """Return the times of the bundled model beside PyTorch's, as Markdown."""
    model, environment = result.model, result.environment
    packages = environment.packages
    assert result.baseline is not None
    assert result.parity is not None
    command = "nsp bench --quick" if result.options.get("quick") else "nsp bench"
    lines = [
        f"The bundled text-to-image model of family `{model.family}` ({model.image_size_px} px, "
        f"{model.schedule_words}, guidance on, {model.precision}), `{command}` on",
        f"{environment.threads} cores of an {environment.cpu}, ONNX Runtime "
        f"{packages['onnxruntime']} against PyTorch {packages['torch'].partition('+')[0]} eager, "
        "interleaved rounds, medians:",
        "",
        *_table(result),
    ]
    if not result.trusted:
        lines += ["", f"No ratios, because this run is not trusted: {'; '.join(result.warnings)}."]
    elif result.ceilings is not None:
        lines += [
            "",
            f"The machine's own speed varied by {100 * result.ceilings.drift:.0f} % during that "
            "run: read the ratios, not the milliseconds.",
        ]
    return "\n".join(lines)


def _table(result: BenchResult) -> Iterator[str]:
    """Yield the lines of the table; the column of ratios only of a run that is trusted."""
    for cells in (("", "engines", "PyTorch", "ratio"), ("---", *["---:"] * 3), *_rows(result)):
        yield f"| {' | '.join(cells if result.trusted else cells[:-1])} |".replace("|  |", "| |", 1)


def _rows(result: BenchResult) -> Iterator[tuple[str, str, str, str]]:
    """Yield the table's rows."""
    for batch in result.batches:
        alone = batch.batch == 1
        name = "one image, prompt to pixels" if alone else f"{batch.batch} images at once"
        yield _time_row(result, name, batch.end_to_end)
        if alone and batch.loop is not None:
            name = f"of it the {len(batch.step_rows)} scale steps"
            yield _time_row(result, name, batch.loop)
    ours, theirs = (_cold(result, side, "first_step_ms") for side in _sides(result))
    yield (
        "new process to the first scale step",
        f"{ours / 1e3:.2g} s",
        f"{theirs / 1e3:.2g} s",
        f"{theirs / ours:.0f}x",
    )
    ours, theirs = (_cold(result, side, "peak_mib") for side in _sides(result))
    yield "peak memory", f"{ours:.0f} MiB", f"{theirs:.0f} MiB", f"{ours / theirs:.2f}x"
    parity = result.parity
    assert parity is not None
    shares = [s for s in (parity.token_agreement, parity.free_token_agreement) if s is not None]
    if shares:
        name = "sampled tokens equal to PyTorch's, teacher-forced and free-running"
        yield name, percent(min(shares)), "", ""
    error = f"{parity.max_relative_error:.0e}".replace("e-0", "e-")
    yield f"largest {'logit' if shares else 'latent'} error over its range", error, "", ""


def _time_row(result: BenchResult, name: str, row: Row) -> tuple[str, str, str, str]:
    assert row.baseline is not None
    reached = row.of_roof(result.ceilings) if result.trusted else None
    share = "" if reached is None else f" ({100 * reached:.0f} % of the GEMM peak)"
    ours, theirs = row.contender.p50, row.baseline.p50
    return name, f"{ours:.0f} ms{share}", f"{theirs:.0f} ms", f"{theirs / ours:.2f}x"


def _sides(result: BenchResult) -> tuple[str, str]:
    assert result.baseline is not None
    return result.contender, result.baseline


def _cold(result: BenchResult, side: str, field: str) -> float:
    runs = [run for run in result.cold_runs if run.contender == side]
    return float(statistics.median(getattr(run, field) for run in runs))


@dataclass(frozen=True)
class Source:
    """How a committed result is read, and what the README says about it."""

    read: Callable[[Path], Any]
    text: Callable[[Any], str]


# Between `begin(name)` and END.
SECTIONS: Mapping[str, Source] = {
    "emoji_cpu.json": Source(read_result, measured),
    "w512_cpu.json": Source(read_result, steps),
    "next_scale_cpu.json": Source(read_result, measured),
    "next_patch_w512_cpu.json": Source(read_result, steps),
    "sizes.json": Source(read_sizes, size_table),
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
