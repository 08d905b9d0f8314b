"""Checks of everything around the model: training, export, the verbs, engines without torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.manifest import read_manifest
from nsp.data.pictures import decode_rgb
from nsp.family.recipe import PhaseConfig, RunConfig
from nsp.testing.under_test import UnderTest

_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it is an ImportError
from pathlib import Path
from nsp.pipeline.pipeline import load_pipeline
from nsp.pipeline.orders import make_orders
pipeline = load_pipeline(Path(sys.argv[1]))
batches = pipeline.family.examples(pipeline.config, pipeline.sampling)
print(pipeline.images(batches[0]).shape)
"""


def exported_stages_equal_pytorch(made: UnderTest) -> None:
    """An export to ONNX Runtime in fp32 and fp16 passes its gates, and so do its recordings."""
    from nsp.export.proof.kept import MOST_BYTES
    from nsp.export.proof.verify import verify

    manifest = read_manifest(made.engines)
    assert [*manifest.stages] == [*made.declared], "engines have other stages than the family"
    for recorded in (False, True):
        source = None if recorded else made.checkpoint
        failure = verify(made.engines, checkpoint=source, recorded=recorded).failure()
        assert failure is None, str(failure)
    size = sum((made.engines / name).stat().st_size for name in manifest.recorded)
    assert size <= 1.1 * MOST_BYTES, f"{size / 1e6:.0f} MB of recorded calls"


def engines_need_no_torch(made: UnderTest) -> None:
    """Engines are opened and make pictures in a process that cannot import torch."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(made.engines)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr.strip().rpartition("\n")[2]


def the_verbs_run(made: UnderTest) -> None:
    """`nsp generate`, `verify`, `inspect` and `bench` do their work on engines.

    Pictures are generated from the checkpoint, too, and two seeds give two of them.
    """
    order = made.orders[0]
    asked = {"prompt": ["--prompt", str(order.condition)], "none": []}.get(
        made.family.condition(made.config), ["--class-id", str(order.condition)]
    )
    out = made.folder / "pictures made"
    sources = (("--engine-dir", made.engines), ("--checkpoint", made.checkpoint))
    for number, source in enumerate(sources):
        _nsp("generate", *source, *asked, "--output-dir", out / str(number), "--num-images", 2)
        found = sorted((out / str(number)).glob("*.png"))
        assert len(found) >= 2, f"nsp generate wrote {len(found)} pictures of 2"
        first, second = (decode_rgb(path.read_bytes()).tobytes() for path in found[:2])
        assert first != second, "two seeds give the same picture"
    checked = json.loads(_nsp("verify", made.engines, "--recorded", "--json"))
    assert all(stage["passed"] for stage in checked["stages"]), "nsp verify found a wrong stage"
    assert made.family.name in _nsp("inspect", made.engines), "nsp inspect names no family"
    bench = ("--quick", "--checkpoint", made.checkpoint, "--output-dir", made.folder / "bench")
    _nsp("bench", "--engine-dir", made.engines, *bench)


def a_resumed_run_equals_one_in_one_go(made: UnderTest) -> None:
    """Two training steps of the recipe, with a stop between them or without, are bit for bit equal.

    The last phase is tried; those before it are trained for one step.
    """
    whole, stopped = made.folder / "whole", made.folder / "stopped"
    run = _short(made)
    _train(run, whole)
    first, last = run.phases[:-1], run.phases[-1]
    _train(replace(run, phases=(*first, replace(last, steps=1))), stopped)
    _train(run, stopped, resume=True)
    expected, found = (
        read_checkpoint(folder / "checkpoint").load().state_dict() for folder in (whole, stopped)
    )
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not changed, f"weights differ: {changed[0]} and {len(changed) - 1} more"


def _short(made: UnderTest) -> RunConfig:
    """Return the recipe on a few pictures, in the fewest steps that can be resumed."""

    def phase(each: PhaseConfig, steps: int) -> PhaseConfig:
        return replace(
            each,
            steps=steps,
            batch_size=4,
            optimizer=replace(each.optimizer, schedule="constant", warmup_steps=0),
            sample_every=100,
            validate_every=100,
            checkpoint_every=1,
            log_every=1,
        )

    *first, last = made.run.phases
    return replace(
        made.run,
        data=replace(made.run.data, source=str(made.pictures), token_cache=None),
        phases=(*(phase(each, 1) for each in first), phase(last, 2)),
        tracking=replace(made.run.tracking, tensorboard=False),
    )


def _train(run: RunConfig, folder: Path, *, resume: bool = False) -> None:
    from nsp.training.whole_run import train

    assert train(run, folder, resume=resume, device="cpu").finished, "the run did not finish"


def _nsp(*arguments: Any) -> str:
    """Run the command line in this process and return what it prints; it must not fail."""
    from nsp.cli import main

    result = CliRunner().invoke(main, [str(each) for each in arguments])
    words = " ".join(str(each) for each in arguments[:2])
    assert result.exit_code == 0, f"nsp {words}: {result.output.strip()[-500:]}"
    return result.stdout
