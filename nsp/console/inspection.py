"""The description of an engine folder or a checkpoint folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.artifacts.manifest import Manifest, read_manifest
from nsp.errors import CheckpointError, EngineError
from nsp.paths import describe, wrong_path
from nsp.stage.arena import is_cached
from nsp.walk import files_below

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MAX_TEXT = 400  # characters shown of a long list; --json has all of it


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return the manifest of an engine folder, or the configuration of a checkpoint, JSON-ready.

    "sizes" has the bytes of every file, null for a missing one. Raises EngineError or
    CheckpointError when it is damaged or neither of the two.
    """
    if is_checkpoint(folder):
        return _describe_checkpoint(folder)
    if (found := describe(folder)).kind not in ("engines", "unfinished export"):
        raise EngineError(wrong_path(folder, "model", found))
    manifest = read_manifest(folder)
    stages = manifest.stages.values()
    shared = [*manifest.files, *manifest.recorded]
    names = [*shared, *(f for variants in stages for v in variants for f in v.files)]
    sizes = {name: _size(folder / name) for name in names}
    return {"kind": "engines", "folder": str(folder), **manifest.to_dict(), "sizes": sizes}


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint folder with its files."""
    record = read_checkpoint(folder, verify=False)
    files = list(files_below(folder))
    return {
        "kind": "checkpoint",
        "folder": str(folder),
        "family": record.family.name,
        "config": dict(record.config),
        "model_hash": record.weights_hash(),
        "digests": _digests_in_words(folder),
        "sampling": dict(record.sampling),
        "notes": dict(record.notes),
        "sizes": {str(path.relative_to(folder)): _size(path) for path in files},
    }


def _digests_in_words(folder: Path) -> str:
    """Return whether the files are unchanged since they were written."""
    try:
        record = read_checkpoint(folder)
        return (
            "match" if record.files and record.digests else "none: the folder is older than digests"
        )
    except CheckpointError as error:
        return str(error)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def render_folder(found: Mapping[str, Any], *, everything: bool = False) -> list["RenderableType"]:
    """Return tables of `describe_folder`'s facts, to be printed one after another.

    `everything`: with each compiled stage's tensors, profiles, precisions and measured errors.
    """
    head = _plain_table()
    head.add_row(found["kind"], found["folder"])
    head.add_row("family", found["family"])
    head.add_row("model", found["model_hash"])
    if digests := found.get("digests"):
        head.add_row("digests", digests)
    if source := found.get("source"):
        head.add_row("source", source)
    for key, text in [*_lines("config", found["config"]), *_lines("sampling", found["sampling"])]:
        head.add_row(key, text)
    if notes := found.get("notes"):
        head.add_row("notes", _shortened(_compact(notes)))
    if found["kind"] == "checkpoint":
        return [head, _files_table(found["sizes"], found["sizes"])]
    tables: list[RenderableType] = [head]
    if shared := [*found["files"], *found["recorded"]]:
        tables.append(_files_table(shared, found["sizes"]))
    tables.append(_overview(found))
    if not everything:
        return tables
    for stage, variants in found["stages"].items():
        tables.append(f"\n{stage}")
        tables.extend(_variant_table(variant, found["sizes"]) for variant in variants)
    return tables


def _overview(found: Mapping[str, Any]) -> "Table":
    """Return a line per compiled stage."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("\nstage", "\nbackend", "\nprecision", "\ncache", "\nsize", "\nparity"):
        table.add_column(name)
    for stage, variants in found["stages"].items():
        for variant in variants:
            sizes = [found["sizes"][name] for name in variant["files"]]
            size = None if None in sizes else sum(sizes)
            facts = (variant["backend"], variant["precision"], _cache_of(variant))
            table.add_row(stage, *facts, _readable(size), _parity_of(variant["parity"]))
    return table


def _parity_of(parity: Mapping[str, Any]) -> str:
    """Return in a few words how close a stage came to PyTorch when it was exported."""
    if (psnr := parity.get("psnr_db")) is not None:
        return f"{psnr:.1f} dB"
    outputs: Mapping[str, Mapping[str, float]] = parity.get("outputs", {})
    errors = [each["relative"] for each in outputs.values()]
    words = f"error {max(errors):.1e} of the range" if errors else ""
    drawn = [each for each in parity.get("units", ()) if "tokens" in each]
    if drawn:
        count = sum(each["tokens"] for each in drawn)
        equal = sum(each["tokens"] * each["agreement"] for each in drawn) / count
        return f"{equal:.2%} of {count} tokens, {words}"
    return words


def parity_lines(manifest: Manifest) -> list[str]:
    """Return for every backend and precision the parity with PyTorch that the export measured.

    It is that of the stage whose outputs differ most, and of the stages where tokens or decibels
    are counted.
    """
    lines = []
    engines = [(name, each) for name, built in manifest.stages.items() for each in built]
    for kind in dict.fromkeys((each.backend, each.precision) for _, each in engines):
        found = {n: each.parity for n, each in engines if (each.backend, each.precision) == kind}
        counted = [f"{n} {_parity_of(p)}" for n, p in found.items() if _is_counted(p)]
        errors = {n: _largest_error(p) for n, p in found.items() if p.get("outputs")}
        if errors and not counted:
            worst = max(errors, key=lambda name: errors[name])
            counted = [f"{worst} {_parity_of(found[worst])}"]
        if counted:
            lines.append(f"parity of {kind[0]} {kind[1]}: {'; '.join(counted)}")
    return lines


def _is_counted(parity: Mapping[str, Any]) -> bool:
    """Return whether tokens or decibels were measured."""
    return "psnr_db" in parity or any("tokens" in each for each in parity.get("units", ()))


def _largest_error(parity: Mapping[str, Any]) -> float:
    return max(float(each["relative"]) for each in parity["outputs"].values())


def _cache_of(variant: Mapping[str, Any]) -> str:
    """Return the layout of the keys and values that a stage reads or adds; "none" without them."""
    names = (name for tensors in variant["io"].values() for name in tensors)
    layout: str = variant["kv_layout"] if any(map(is_cached, names)) else "none"
    return layout


def _variant_table(variant: Mapping[str, Any], sizes: Mapping[str, int | None]) -> "RenderableType":
    """Return everything about one compiled stage."""
    from rich.padding import Padding

    table = _plain_table()
    table.add_row(variant["backend"], variant["precision"])
    table.add_row("cache layout", _cache_of(variant))
    table.add_row("opset", str(variant["opset"]))
    for name, digest in variant["files"].items():
        table.add_row("file", f"{name}  {_readable(sizes[name])}  sha256 {digest[:12]}")
    limit = variant["max_batch"]
    table.add_row("max batch", "any" if limit is None else str(limit))
    for side in ("inputs", "outputs"):
        tensors = variant["io"].get(side, {}).items()
        table.add_row(side, _shortened(", ".join(f"{n} ({a}) {d}" for n, (a, d) in tensors)))
    for number, profile in enumerate(variant["profiles"]):
        table.add_row(f"profile {number}", _shortened(_compact(profile)))
    kept: dict[str, list[str]] = {}
    for name, dtype in variant["precision_map"].items():
        kept.setdefault(dtype, []).append(name)
    for dtype, names in kept.items():
        table.add_row(f"{dtype} are", ", ".join(names))
    for name in ("parity", "tools", "device"):
        for key, text in _lines(name, variant[name]):
            table.add_row(key, text)
    table.add_row("built in", f"{variant['build_seconds']:.1f} s")
    return Padding(table, (0, 0, 0, 2))


def _plain_table() -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _files_table(names: Iterable[str], sizes: Mapping[str, int | None]) -> "Table":
    table = _plain_table()
    for name in names:
        table.add_row(name, _readable(sizes[name]))
    return table


def _lines(name: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (heading, text): plain values together, nested ones under their own headings."""
    plain, nested = {}, []
    for key, value in values.items():
        if isinstance(value, Mapping):
            nested += _lines(f"{name}.{key}", value)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            nested += _lines(f"{name}.{key}", {str(n): item for n, item in enumerate(value)})
        else:
            plain[key] = value
    return ([(name, _compact(plain))] if plain else []) + nested


def _compact(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def _readable(size: int | None) -> str:
    """Return a size in words."""
    if size is None:
        return "missing"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
