"""Prints which of our modules run on a road: python -P -m tests.road ROAD FOLDER…, as JSON.

A module is on a road when one of its functions is called there, or a lambda, comprehension or
generator in one. What runs while a module is imported does not count, nor does what dataclasses
write. A road is measured in a process of its own: what was made before is not made again.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_ROOT = f"{Path(__file__).parents[1]}/"
_FUNCTION = 1  # CO_OPTIMIZED: the body of a class has it not


class Passed:
    """The modules that are passed between `with` and its end, in all threads."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._local = threading.local()  # .imports: how deep this thread is in imports of ours

    def __enter__(self) -> "Passed":
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(_ROOT):
            return
        imports = getattr(self._local, "imports", 0)
        if code.co_name == "<module>":
            self._local.imports = imports + (1 if event == "call" else -1)
        elif event == "call" and not imports and code.co_flags & _FUNCTION:
            name = frame.f_globals["__name__"]
            if name.partition(".")[0] == "nsp":
                self.modules.add(name)


def load_and_call(engines: str) -> dict[str, set[str]]:
    """Pass the road of the Python API: loading, then one picture."""
    import nsp

    with Passed() as loading:
        pipe = nsp.Pipeline.from_pretrained(engines)
        pipe.backend.wait()
    with Passed() as calling:
        pipe("red apple")
    return {"loading": loading.modules, "call": calling.modules}


def generate(engines: str, output: str) -> dict[str, set[str]]:
    """Pass the road of `nsp generate`."""
    from nsp.cli import main

    where = ["--engine-dir", engines, "--output-dir", output]
    with Passed() as passed:
        try:
            main(["generate", "--prompt", "red apple", *where])
        except SystemExit as end:
            if end.code:
                raise
    imported = {name for name in sys.modules if name.partition(".")[0] == "nsp"}
    return {"generate": passed.modules, "imported": imported}


class _FirstStep(BaseException):
    """The optimizer is about to make its first step."""


def first_step(output: str) -> dict[str, set[str]]:
    """Pass the road of `train.py` to the first step of its optimizer."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import nsp.training.whole_run  # noqa: F401 - to import its libraries while seen takes 20 s
    from nsp.train import main

    with Passed() as passed:

        def stop(*_: object) -> None:
            sys.setprofile(None)
            raise _FirstStep

        register_optimizer_step_pre_hook(stop)
        try:
            main(["--preset", "smoke", "--output-dir", output])
        except _FirstStep:
            return {"first step": set(passed.modules)}
    raise AssertionError("no optimizer made a step")


ROADS: dict[str, Callable[..., dict[str, set[str]]]] = {
    "call": load_and_call,
    "generate": generate,
    "train": first_step,
}

if __name__ == "__main__":
    found = ROADS[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({name: sorted(modules) for name, modules in found.items()}))
