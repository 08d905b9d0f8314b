"""Damage at random, as disks, transfers, editors and strangers do it, for tests."""

import json
import os
import random
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 10**400, 1e300, float("nan"), float("-inf"), "", "x" * 5000, "a\nb",
    "\ud800", "../..", [], {}, [[]], {"a": {}},
)  # fmt: skip


def mutate(folder: Path, chance: random.Random) -> str:
    """Damage one file of `folder`, in place, and return what was done in words."""
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kinds = ["flip", "zeros", "cut", "append", "remove", "swap"]
    if path.suffix == ".json":
        kinds += ["value", "value", "value", "key"]
    kind = chance.choice(kinds)
    content = bytearray(path.read_bytes())
    if kind == "flip" and content:
        for _ in range(chance.choice((1, 1, 8))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind == "zeros" and content:
        start = chance.randrange(len(content))
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        path.write_bytes(content)
    elif kind == "cut":
        os.truncate(path, chance.randrange(len(content) + 1))
    elif kind == "append":
        path.write_bytes(content + chance.randbytes(9))
    elif kind == "remove":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(chance.choice(sorted(folder.rglob("*.safetensors"))).read_bytes())
    else:
        _edit_json(path, chance, kind)
    return f"{kind} {path.relative_to(folder)}"


def _edit_json(path: Path, chance: random.Random, kind: str) -> None:
    """Set a value somewhere in a JSON file, or take a key out."""
    values = json.loads(path.read_text())
    place: Any = values
    while isinstance(place, dict) and place:
        key = chance.choice(sorted(place))
        if not isinstance(place[key], dict) or not place[key] or chance.random() < 0.3:
            break
        place = place[key]
    if kind == "key":
        place.pop(key)
    else:
        number = isinstance(place[key], int | float) and not isinstance(place[key], bool)
        place[key] = place[key] + 1 if number and chance.random() < 0.5 else chance.choice(_VALUES)
    path.write_text(json.dumps(values))
