"""The schema of a bench.json; earlier ones and results of other programs are refused by name."""

from collections.abc import Mapping

from nsp.errors import ConfigError

SCHEMA = 4  # since it says whether a result can be trusted, and on which kind of processor

# A field that only they have -> results that were never a bench.json.
_OTHERS = {
    "parts": "growth of one picture, by a program that nsp bench has replaced: measure again",
    "contests": "the GPU suite before schema 4: measure again with python -m "
    "nsp.benchmarks.gpu_suite",
    "splits": "nsp bench fidelity, which measures no times",
    "rates": "nsp bench loader, which measures no pictures",
    "step_ms": "nsp bench training, which measures no pictures",
}


def check_schema(values: Mapping[str, object]) -> None:
    """Raise ConfigError unless these are the values of a bench.json of this schema."""
    if "batches" not in values:
        for field, what in _OTHERS.items():
            if field in values:
                raise ConfigError(f"it is a result of {what}")
    if (schema := values.get("schema_version")) != SCHEMA:
        raise ConfigError(
            f"the benchmark result has schema_version {schema}, but this nsp reads {SCHEMA}; "
            "measure again: nsp bench"
        )
