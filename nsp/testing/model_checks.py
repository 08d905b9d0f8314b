"""Checks of a family's model in PyTorch: what it declares, and what an order promises."""

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.artifacts.weight_kinds import matches
from nsp.export.proof.reference import RecordingBackend
from nsp.family.contract import trace_sizes
from nsp.family.order import Order
from nsp.pipeline.orders import cut_batches
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from nsp.pipeline.results import Trace
from nsp.stage.arena import is_cached
from nsp.stage.backend import Backend
from nsp.testing.replaying import ReplayingBackend
from nsp.testing.under_test import UnderTest

ROUNDING = 1e-4  # of the range of a float32 output that another batch or order of sums may change


_FLIPS = 0.02  # tokens of a step that may fall on the other side of an edge


def modules_match_their_declaration(made: UnderTest) -> None:
    """Every stage has a module that returns what is declared, in order, shape and dtype."""
    modules = made.family.learner.modules(made.system, made.layout)
    assert [*modules] == [*made.declared], (
        f"modules are {[*modules]}, declared stages are {[*made.declared]}"
    )
    sizes = trace_sizes(made.declared)
    for name, stage in made.declared.items():
        with torch.no_grad():
            results = modules[name](*_zeros(made, name))
        found = [(tuple(r.shape), str(r.dtype).removeprefix("torch.")) for r in results]
        declared = [(spec.shape(sizes), spec.dtype) for spec in stage.io.outputs.values()]
        assert found == declared, f"stage {name} returns {found}, declared are {declared}"


def every_weight_has_one_precision(made: UnderTest) -> None:
    """Every parameter that stages compute with is named by a pattern: half or full, not both."""
    named = dict(made.system.named_parameters())
    modules = made.family.learner.modules(made.system, made.layout)
    half = [pattern for stage in made.declared.values() for pattern in stage.half]
    full = [pattern for stage in made.declared.values() for pattern in stage.full]
    for stage, declared in made.declared.items():
        results = [each for each in modules[stage](*_zeros(made, stage)) if each.requires_grad]
        total = sum((each.sum() for each in results), torch.zeros(()))
        if not results:
            continue
        grads = torch.autograd.grad(total, [*named.values()], allow_unused=True)
        for name in (name for name, grad in zip(named, grads, strict=True) if grad is not None):
            kinds = (matches(name, half), matches(name, full))
            assert any(kinds), f"stage {stage}: {name} is in no pattern, half or full"
            assert not all(kinds), f"stage {stage}: {name} is both half and full"
        stray = [pattern for pattern in declared.int8 if pattern not in declared.half]
        assert not stray, f"stage {stage}: int8 names {stray}, which are not among half"


def examples_call_every_stage(made: UnderTest) -> None:
    """The orders of `examples` together call every declared stage, each with finite results."""
    modules = made.family.learner.modules(made.system, made.layout)
    io = {name: stage.io for name, stage in made.declared.items()}
    backend = RecordingBackend(modules, io, kv_layout=made.layout, device="cpu")
    pipeline = _pipeline(made, backend)
    backend.forget()
    for orders in made.family.examples(made.config, made.pipeline.sampling):
        trace = pipeline.trace(orders)
        assert np.isfinite(trace.image).all(), "an example's picture is not finite"
    called = {call.stage for call in backend.recording().calls}
    assert called == {*made.declared}, f"never called: {sorted({*made.declared} - called)}"


def steps_count_from_zero_to_their_total(made: UnderTest) -> None:
    """Steps are numbered from 0 to total - 1 in one unit, and the last one has the latent."""
    steps = list(made.pipeline.run(made.orders))
    assert [step.index for step in steps] == list(range(steps[0].total)), "wrong numbers of steps"
    assert len({step.unit for step in steps}) == 1, "steps have several units"
    assert steps[-1].latent is not None, "the last step has no latent to decode"


def pictures_have_the_declared_size(made: UnderTest) -> None:
    """Pictures are in [0, 1] and of the configuration's size; last grid and latent agree."""
    trace, side = made.pipeline.trace(made.orders), made.config.image_size_px
    assert trace.image.shape == (len(made.orders), 3, side, side), f"{trace.image.shape}"
    assert trace.image.min() >= 0, "a picture has pixels below 0"
    assert trace.image.max() <= 1, "a picture has pixels above 1"
    grid = made.family.grids(made.config)[-1]
    assert trace.latents[-1].shape[-2:] == tuple(grid), (
        f"the last latent is {trace.latents[-1].shape}, the last grid {tuple(grid)}"
    )


def cached_equals_full_pass(made: UnderTest) -> None:
    """What steps compute with a cache is what a single pass computes."""
    if made.family.cache(made.config, 1, "float32") is None:
        names = {n for s in made.declared.values() for n in (*s.io.inputs, *s.io.outputs)}
        assert not any(map(is_cached, names)), "stages have keys and values, the family no cache"
        return
    orders = [_unguided(order) for order in made.orders]
    trace = made.pipeline.trace(orders)
    learner = made.family.learner
    whole = learner.without_cache(made.system, orders, trace.tokens, trace.latents)
    stepwise = trace.logits or trace.latents
    assert len(whole) == len(stepwise), f"{len(whole)} steps in one pass, {len(stepwise)} cached"
    for step, (expected, found) in enumerate(zip(whole, stepwise, strict=True)):
        _assert_close(expected, found, f"step {step} with a cache")


def cache_layouts_agree(made: UnderTest) -> None:
    """Every layout of the cache that the family names gives the same images."""
    expected = made.pipeline.trace(made.orders)
    for layout in made.family.kv_layouts:
        other = torch_pipeline(made.family, made.system, kv_layout=layout, device="cpu")
        found = other.trace(made.orders)
        for row in range(len(made.orders)):
            _assert_same_image(expected, row, found, row, f"image {row} in layout {layout}")


def an_image_does_not_depend_on_its_batch(made: UnderTest) -> None:
    """Every order gives the same image alone and among others, whatever their settings are."""
    for orders in (made.orders, made.mixed):
        together = made.pipeline.trace(orders)
        for row, order in enumerate(orders):
            what = f"image {row} alone ({order.sampling})"
            _assert_same_image(made.pipeline.trace([order]), 0, together, row, what)


def seeds_decide_images(made: UnderTest) -> None:
    """An order gives the same image again, and with another seed another one."""
    order = made.orders[0]
    first, again = made.pipeline.trace([order]), made.pipeline.trace([order])
    _assert_same_image(first, 0, again, 0, "the same order again")
    other = made.pipeline.trace([dataclasses.replace(order, seed=order.seed + 1)])
    assert not np.array_equal(first.image, other.image), "another seed gives the same picture"


def a_recorded_loop_equals_a_plain_one(made: UnderTest) -> None:
    """Replayed stage calls on new inputs give what the loop gives, as CUDA graphs need it."""
    modules = made.family.learner.modules(made.system, made.layout)
    io = {name: stage.io for name, stage in made.declared.items()}
    backend = ReplayingBackend(modules, io, kv_layout=made.layout, device="cpu")
    replaying = _pipeline(made, backend)
    for shift in (0, 1000):
        orders = [dataclasses.replace(each, seed=each.seed + shift) for each in made.orders]
        expected, found = made.pipeline.trace(orders), replaying.trace(orders)
        for row in range(len(orders)):
            _assert_same_image(expected, row, found, row, f"image {row} from a recorded loop")
    assert len(backend.recordings) == 1, "orders that differ in their seed need a new recording"


def configurations_and_checkpoints_round_trip(made: UnderTest) -> None:
    """Configurations and settings go through dictionaries, models through folders, unchanged."""
    from nsp.artifacts.checkpoint import read_checkpoint

    for value in (*made.family.sizes.values(), made.config, made.pipeline.sampling):
        assert type(value).from_dict(value.to_dict()) == value, f"{value} changes on its way"
    loaded = read_checkpoint(made.checkpoint).load()
    assert loaded.config == made.config, "the configuration changes in a checkpoint folder"
    before, after = made.system.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys(), f"keys differ: {before.keys() ^ after.keys()}"
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not changed, f"changed in a checkpoint folder: {', '.join(changed)}"


def orders_are_cut_by_their_keys(made: UnderTest) -> None:
    """Keys of a batch are hashable and equal for orders that differ in their seed alone."""
    shifted = [dataclasses.replace(each, seed=each.seed + 1000) for each in made.orders]
    cut = cut_batches(made.pipeline, [*made.orders, *shifted], 2 * len(shifted))
    assert len(cut) == 1, f"orders that differ in their seed fall into {len(cut)} batches"


def _zeros(made: UnderTest, stage: str) -> list[torch.Tensor]:
    """Return inputs of a stage, all zero, with a size of its own for every free axis."""
    sizes = trace_sizes(made.declared)
    specs = made.declared[stage].io.inputs.values()
    return [torch.zeros(s.shape(sizes), dtype=getattr(torch, s.dtype)) for s in specs]


def _pipeline(made: UnderTest, backend: Backend) -> Pipeline:
    return Pipeline(
        made.family,
        made.config,
        backend,
        tokenizer=made.system.prompt_tokenizer,
        sampling=made.pipeline.sampling,
    )


def _unguided(order: Order[Any]) -> Order[Any]:
    """Return the order with guidance off, where its family has guidance."""
    names = {each.name for each in dataclasses.fields(order.sampling)}
    off = {"guidance_scale": 1.0} if "guidance_scale" in names else {}
    return dataclasses.replace(order, sampling=order.sampling.changed(off))


def _assert_close(expected: NDArray[Any], found: NDArray[Any], what: str) -> None:
    span = float(np.ptp(expected)) or 1.0
    error = float(np.abs(expected.astype(np.float64) - found).max()) / span
    assert error <= ROUNDING, f"{what} differs by {error:.1e} of the range; limit {ROUNDING}"


def _assert_same_image(expected: Trace, row: int, found: Trace, place: int, what: str) -> None:
    """Compare one image of two traces: its tokens, up to what rounding may flip, and its latent."""
    for step, (a, b) in enumerate(zip(expected.tokens, found.tokens, strict=True)):
        differ = float(np.mean(a[row] != b[place]))
        if differ:  # a draw beside an edge: what follows is another picture, rightly
            assert differ <= _FLIPS, f"{what}: {differ:.0%} of the tokens of step {step} differ"
            before, after = expected.logits[step][row], found.logits[step][place]
            _assert_close(before, after, f"{what}: logits of step {step}")
            return
    for step, (before, after) in enumerate(zip(expected.latents, found.latents, strict=True)):
        _assert_close(before[row], after[place], f"{what}: latent {step}")
