"""What a memory plan promises: the bytes of weights, arena and buffers before anything loads."""

import dataclasses
from pathlib import Path

import pytest

from nsp.artifacts.manifest import Variant
from nsp.artifacts.memory_plan import plan_memory
from nsp.errors import EngineError
from nsp.family.registry import family
from tests.artifacts.engine_folders import CLASSES, write_engines


def variants(folder: Path, *, max_batch: int) -> dict[str, Variant]:
    manifest = write_engines(folder, CLASSES, kv_layout="delta", max_batch=max_batch)
    declared = family("var").stages(CLASSES, kv_layout="delta", dtype="float32")
    bounds = {"max_batch": max_batch, "static_batch": False, "best_ranks": 1, "max_ranks": 3839}
    return {
        name: dataclasses.replace(
            manifest.stages[name][0],
            profiles=tuple(stage.io.profile(sizes) for sizes in stage.profiles(**bounds)),
        )
        for name, stage in declared.items()
    }


def test_the_plan_holds_the_arena_and_what_the_stages_write(tmp_path: Path) -> None:
    planned = plan_memory(tmp_path, variants(tmp_path, max_batch=4))
    assert planned is not None
    files = sum(path.stat().st_size for path in tmp_path.glob("*/*/model.onnx"))
    assert planned.weights == files
    predictor, tokens = CLASSES.predictor, CLASSES.num_tokens
    arena = 4 * 2 * predictor.depth * tokens * 8 * predictor.num_heads * predictor.head_width
    logits = 4 * 8 * tokens * CLASSES.vae.vocab_size
    guided = 4 * 4 * tokens * CLASSES.vae.vocab_size
    image = 4 * 4 * 3 * CLASSES.image_size_px**2
    least = arena + logits + 2 * guided + image
    assert least < planned.buffers < 1.5 * least
    assert "(batch 4)" in str(planned)


def test_a_larger_batch_takes_more_and_free_sizes_are_not_planned(tmp_path: Path) -> None:
    small, large = (
        plan_memory(tmp_path / str(n), variants(tmp_path / str(n), max_batch=n)) for n in (1, 8)
    )
    assert small is not None
    assert large is not None
    assert 7 < large.buffers / small.buffers <= 8
    manifest = write_engines(tmp_path / "onnx", CLASSES)
    assert plan_memory(tmp_path / "onnx", {s: v[0] for s, v in manifest.stages.items()}) is None


def test_a_missing_engine_is_one_line(tmp_path: Path) -> None:
    """Where the files are not verified, the plan is the first to look at them."""
    planned = variants(tmp_path, max_batch=1)
    missing = tmp_path / next(iter(planned["step"].files))
    missing.unlink()
    with pytest.raises(EngineError, match=f"^{missing} is missing though the manifest lists it$"):
        plan_memory(tmp_path, planned)
