"""Results of earlier schemas, as this one has them; results of other programs, refused by name."""

from collections.abc import Mapping
from typing import Any

from nsp.benchmarks.record.times import Observation, measured_times, percentiles
from nsp.errors import ConfigError

SCHEMA = 4
# 1 has no contract, no other contenders and no sweep; 2 no footprint and no guidance ended early,
# and its `imported_mib` leaves out the backend's library; 3 has other names, no parts of the loop,
# no kind of processor, and does not say whether it can be trusted.
READABLE = (1, 2, 3)

# A field that only they have -> results that were never a bench.json.
_OTHERS = {
    "parts": "growth of one picture, by a program that nsp bench has replaced: measure again",
    "contests": "the GPU suite before schema 4: measure again with python -m "
    "nsp.benchmarks.gpu_suite",
    "splits": "nsp bench fidelity, which measures no times",
    "rates": "nsp bench loader, which measures no pictures",
    "step_ms": "nsp bench training, which measures no pictures",
}
_NAMES = {
    "contestant": "contender",
    "candidate": "contender",
    "rivals": "others",
    "scale_rows": "step_rows",
    "reference": "baseline",
    "scales": "steps",
    "first_divergent_scale": "first_divergent_step",
}


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as schema 4 has them; ConfigError for what is no such result."""
    schema = values.get("schema_version")
    if "batches" not in values:
        for field, what in _OTHERS.items():
            if field in values:
                raise ConfigError(f"it is a result of {what}")
    if schema == SCHEMA or schema is None:
        return dict(values)
    if schema not in READABLE:
        raise ConfigError(
            f"the benchmark result has schema_version {schema}, but this nsp reads "
            f"{', '.join(map(str, READABLE))} and {SCHEMA}; run: nsp bench"
        )
    found: dict[str, Any] = _renamed(values)
    schedule = found["model"]["schedule"]
    names = [f"{side}x{side}" for side in schedule]
    if found["parity"] is not None:
        found["parity"] = _parity(found["parity"], names)
    return {
        **found,
        "schema_version": SCHEMA,
        "trusted": not found["warnings"],
        "batches": [
            _batch(batch, names, found["contender"], found["baseline"])
            for batch in found["batches"]
        ],
    }


def _renamed(value: Any) -> Any:
    """Return a JSON value with the fields' names of today; settings and names of stages stay."""
    if isinstance(value, Mapping):
        kept = ("options", "sampling", "stage_ms", "stage_mib", "weights_mib", "packages")
        return {
            _NAMES.get(name, name): each if name in kept else _renamed(each)
            for name, each in value.items()
        }
    return [_renamed(each) for each in value] if isinstance(value, list | tuple) else value


def _parity(parity: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the parity: a scale had its number where a step has a name."""
    steps = []
    for step in parity["steps"]:
        kept = {key: each for key, each in step.items() if key != "scale"}
        steps.append({**kept, "name": names[step["scale"]]})
    flips = [{**_without(flip, "scale"), "step": flip["scale"]} for flip in parity["flips"]]
    return {**parity, "steps": steps, "flips": flips}


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: each for key, each in values.items() if key != name}


def _batch(
    batch: Mapping[str, Any], names: list[str], contender: str, baseline: str | None
) -> dict[str, Any]:
    """Return a batch size with its parts: stages called once per scale are those of the loop.

    The stage whose scales have rows of their own is the one with most work.
    """
    rows, per_scale = batch["rows"], batch["step_rows"]
    repeated = len(names) if len(names) > 1 else 0
    parts = [
        _part(row["name"], None, {row["name"]: (0, row["calls"])}, [row])
        for row in rows[:-2]
        if row["calls"] != repeated
    ]
    in_loop = [row for row in rows[:-2] if row["calls"] == repeated]
    first = rows.index(in_loop[0]) if in_loop else 0
    widest = max(in_loop, key=_gflop, default=None)
    steps = []
    for index, name in enumerate(names if in_loop else ()):
        calls = {row["name"]: (index, index + 1) for row in in_loop}
        step = _part(name, "scale", calls, [])
        for row in in_loop:
            mine = per_scale[index] if per_scale and row is widest else row
            share = 1 if mine is not row else len(names)
            if mine["cost"] is not None:
                step["costs"][row["name"]] = {k: v / share for k, v in mine["cost"].items()}
        steps.append(step)
    loop = _loop(batch, in_loop, contender, baseline) if in_loop else None
    return {**batch, "parts": [*parts[:first], *steps, *parts[first:]], "loop": loop}


def _part(
    name: str, unit: str | None, calls: Mapping[str, Any], rows: list[Mapping[str, Any]]
) -> dict[str, Any]:
    costs = {row["name"]: row["cost"] for row in rows if row["cost"] is not None}
    return {"name": name, "unit": unit, "calls": dict(calls), "costs": costs}


def _gflop(row: Mapping[str, Any]) -> float:
    return row["cost"]["gflop"] if row["cost"] else 0.0


def _loop(
    batch: Mapping[str, Any],
    in_loop: list[Mapping[str, Any]],
    contender: str,
    baseline: str | None,
) -> dict[str, Any]:
    """Return the row of all steps."""
    observed = [Observation.from_dict(each) for each in batch["observations"]]

    def times(name: str) -> dict[str, Any]:
        found = measured_times(
            observed, name, lambda o: sum(o.stage_total_ms(row["name"]) for row in in_loop)
        )
        return percentiles(found).to_dict()

    costs = [row["cost"] for row in in_loop]
    known = all(cost is not None for cost in costs)
    return {
        "name": "all steps",
        "calls": max(row["calls"] for row in in_loop),
        "contender": times(contender),
        "baseline": None if baseline is None else times(baseline),
        "cost": {k: sum(cost[k] for cost in costs) for k in ("gflop", "mib")} if known else None,
    }
