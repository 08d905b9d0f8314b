"""What two results must have in common before their times may be compared."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from nsp.config import Config

# Part of every result: whoever moves the clock changes this text, and old results are refused.
TIMING_BOUNDARY = "prompts or class ids in host memory to uint8 images in host memory"


@dataclass(frozen=True, kw_only=True)
class Contract(Config):
    """The work and the machine. What may differ, and is what one compares, is the software."""

    weights: str  # hash of the model
    conditions: tuple[str, ...]  # prompts or class ids of the largest batch
    seed: int
    schedule: tuple[int, ...]
    image_size_px: int
    sampling: dict[str, str]
    timing_boundary: str
    device: str
    machine: dict[str, str]  # processor and its kind, cores, threads, memory, GPU

    def differences(self, other: "Contract") -> Iterator[str]:
        """Yield every field that differs, with both values, in words."""
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(other, field.name)
            if isinstance(old, dict):
                for key in sorted(old.keys() | new.keys()):
                    a, b = old.get(key, "not recorded"), new.get(key, "not recorded")
                    if a != b:
                        yield _difference(f"{field.name} {key}", a, b)
            elif field.name == "conditions":
                # A smaller largest batch is a prefix: only batches of both are compared.
                if any(a != b for a, b in zip(old, new, strict=False)):
                    yield _difference("prompts", list(old), list(new))
            elif old != new:
                yield _difference(field.name.replace("_", " "), old, new)


def _difference(name: str, old: object, new: object) -> str:
    return f"{name}: {_short(old)} and {_short(new)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
