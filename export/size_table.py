"""`python -m nsp.export.size_table` plans every built-in size again, for the README's table.

It takes minutes and no GPU. Then `python -m nsp.benchmarks.readme` writes the table.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from nsp.errors import ConfigError
from nsp.family.registry import BUILT_IN, family
from nsp.files import read_json, write_file

Plans: TypeAlias = Sequence[Mapping[str, Any]]

PLACE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "sizes.json"
BATCH, PRECISION, DEVICE = 8, "fp16", "h200"
_LEFT_OUT = "tiny"  # for tests
_KEPT = ("model", "image_size_px", "weights", "arena", "scratch", "peak", "flop", "floor_ms")


def plan_sizes() -> list[dict[str, Any]]:
    """Return a plan for every named size of the built-in families."""
    return [
        plan_row(f"{name}/{size}")
        for name in BUILT_IN
        for size in family(name).sizes
        if size != _LEFT_OUT
    ]


def plan_row(model: str) -> dict[str, Any]:
    """Return what the table says about one model."""
    from nsp.export.size_plan import plan_model

    values = plan_model(model, batch=BATCH, precision=PRECISION, on=DEVICE).to_dict()
    largest = max(values["training"], key=lambda phase: phase["memory"]["total"])
    training = {name: largest[name] for name in ("name", "batch_size")}
    training["total"] = largest["memory"]["total"]
    return {**{name: values[name] for name in _KEPT}, "training": training}


def read_sizes(path: Path) -> Plans:
    """Return the committed plans; raise ConfigError for a file without them."""
    values = read_json(path)
    if "plans" not in values:
        raise ConfigError(f"{path} has no plans; run: python -m nsp.export.size_table")
    plans: Plans = values["plans"]
    return plans


def size_table(plans: Plans) -> str:
    """Return the plans as Markdown."""
    lines = [
        f"What each size takes, by `nsp plan SIZE --batch {BATCH} --precision {PRECISION} --device "
        f"{DEVICE}`, without running it ([docs/plan.md](docs/plan.md)):",
        "",
        f"| size | image | weights | KV cache, batch {BATCH} | peak, batch {BATCH} | "
        f"GFLOP an image | least ms, batch {BATCH}, H200 | largest phase of training |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for plan in plans:
        training = plan["training"]
        cells = (
            f"`{plan['model']}`",
            f"{plan['image_size_px']} px",
            *(in_words(plan[name]) for name in ("weights", "arena", "peak")),
            f"{1e-9 * plan['flop'] / BATCH:,.1f}",
            f"{plan['floor_ms']:,.2f}",
            f"{in_words(training['total'])} ({training['name']}, batch {training['batch_size']})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(size: int) -> str:
    """Return a size in MiB or GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def main() -> None:
    """Plan all sizes again."""
    with write_file(PLACE) as partial:
        partial.write_text(json.dumps({"plans": plan_sizes()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
