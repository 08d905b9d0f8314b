"""The tables of a comparison of two results."""

from collections.abc import Iterator

from nsp.benchmarks.record.compare import CONFIDENCE, Comparison
from nsp.benchmarks.render.section import Section


def comparison_sections(comparison: Comparison) -> Iterator[Section]:
    """Yield the tables: verdicts first."""
    rows = []
    for each in comparison.batches:
        verdict = comparison.verdicts[each.batch]
        baseline = "-" if each.baseline is None else str(each.baseline)
        rows.append((str(each.batch), verdict, str(each.gate), str(each.plain), baseline))
    units = "in units of the baseline" if comparison.batches[0].adjusted else "in ms"
    yield Section(
        title="New over old" if comparison.trusted else "New over old, not to be trusted",
        header=("batch", "verdict", f"engines, {units}", "engines, in ms", "baseline, in ms"),
        rows=tuple(rows),
        notes=(
            f"Above 1 is slower. Intervals: {CONFIDENCE:.0%}, bootstrap over rounds. Slower means "
            f"by more than {comparison.threshold:.1%}, and not by chance.",
            *comparison.notes,
        ),
    )
    for each in comparison.batches:
        yield Section(
            title=f"Stages, batch {each.batch}",
            header=("stage", "engines, in ms"),
            rows=tuple((name, str(ratio)) for name, ratio in each.stages.items()),
        )
