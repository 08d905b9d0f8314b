"""Each check of the conformance suite fails a family that breaks its promise, and it alone does.

Every broken family is `var` with one thing changed. The checks without files run on all of them;
those that export or train run on the one that each is there for.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nsp.errors import NspError, ParityError
from nsp.families.var import Var
from nsp.families.var.learn import VarLearner
from nsp.families.var.sampling import VarSampling
from nsp.family import registry
from nsp.family.contract import AnyFamily
from nsp.layers.attention import attend_delta
from nsp.testing import MODEL_CHECKS, UnderTest, model_checks, run_checks


class Learning(VarLearner):
    """The learner of `var`, with its modules changed by the family."""

    def __init__(self, change: Callable[[dict[str, nn.Module]], object]) -> None:
        self._change = change

    def modules(self, system, kv_layout):
        modules = dict(super().modules(system, kv_layout))
        self._change(modules)
        return modules


class ChangedModules(Var):
    """`var` with other modules."""

    def change(self, modules: dict[str, nn.Module]) -> object:
        """Change the modules of the stages."""

    @cached_property
    def learner(self):
        return Learning(self.change)


class Around(nn.Module):
    """A stage with its outputs changed."""

    def __init__(self, inner: nn.Module, change: Callable[[tuple], tuple]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *feeds):
        return self.change(self.inner(*feeds))


class HalfThePicture(ChangedModules):
    def change(self, modules):
        modules["decoder"] = Around(modules["decoder"], lambda out: (out[0][..., ::2],))


class NameMissing(ChangedModules):
    def change(self, modules):
        del modules["select_smooth"]


class WeightWithoutPrecision(Var):
    def stages(self, config, *, kv_layout, dtype):
        found = dict(super().stages(config, kv_layout=kv_layout, dtype=dtype))
        found["step"] = dataclasses.replace(
            found["step"], half=tuple(p for p in found["step"].half if "ffn" not in p), int8=()
        )
        return found


class CacheOffByOne(ChangedModules):
    kv_layouts = ("delta",)

    def change(self, modules):
        def forgetful(q, k, v, past, *, scale):
            return attend_delta(q, k, v, tuple(tensor[1:] for tensor in past), scale=scale)

        modules["step"].attend = forgetful


class OneLayoutOffByOne(Var):
    """Its cache is right in layout "delta" and forgets a token in "present"."""

    @cached_property
    def learner(self):
        class Learner(VarLearner):
            def modules(self, system, kv_layout):
                modules = super().modules(system, kv_layout)
                if kv_layout == "present":
                    attend = modules["step"].attend

                    def forgetful(q, k, v, past, *, scale):
                        last = max(past[0].shape[2] - 1, 0)
                        for tensor in past:
                            tensor[:, :, last:] = 0
                        return attend(q, k, v, past, scale=scale)

                    modules["step"].attend = forgetful
                return modules

        return Learner()


class ExamplesMissAStage(Var):
    def examples(self, config, sampling):
        return super().examples(config, sampling)[:1]


class StepsFromOne(Var):
    def loop(self, backend, config, inputs):
        for step in super().loop(backend, config, inputs):
            yield dataclasses.replace(step, index=step.index + 1)


class WrongGrid(Var):
    def grids(self, config):
        return [(side, side + 1) for side in config.patch_nums]


class SharedRandomness(Var):
    """Rows draw from the first image's numbers."""

    def inputs(self, config, orders, text):
        made = super().inputs(config, orders, text)
        for name in [name for name in made if name.startswith("uniforms")]:
            made[name] = np.broadcast_to(made[name][:1], made[name].shape).copy()
        return made


class SharedSettings(Var):
    """All rows have the first order's settings."""

    def inputs(self, config, orders, text):
        same = [dataclasses.replace(order, sampling=orders[0].sampling) for order in orders]
        return super().inputs(config, same, text)


class SeedIgnored(Var):
    def inputs(self, config, orders, text):
        return super().inputs(config, [dataclasses.replace(o, seed=1) for o in orders], text)


class LooksAtValues(Var):
    """Its loop looks at numbers, which no recording can."""

    def loop(self, backend, config, inputs):
        assert float(backend.download(inputs["uniforms_0"]).max()) <= 1
        yield from super().loop(backend, config, inputs)


class UploadsInTheLoop(Var):
    def loop(self, backend, config, inputs):
        yield from super().loop(backend, config, {**inputs, "unused": backend.scalar(1.0)})


class KeyOfItsOwn(Var):
    def batch_key(self, config, order):
        return (super().batch_key(config, order), order.seed // 500)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful(VarSampling):
    """Settings that lose one on their way through a dictionary."""

    own: float = 1.0

    def to_dict(self):
        return {name: each for name, each in super().to_dict().items() if name != "own"}


class SettingLost(Var):
    sampling = Forgetful


BROKEN: dict[type[AnyFamily], object] = {
    HalfThePicture: {
        model_checks.modules_match_their_declaration,
        model_checks.pictures_have_the_declared_size,
    },
    WeightWithoutPrecision: {model_checks.every_weight_has_one_precision},
    CacheOffByOne: {model_checks.cached_equals_full_pass},
    OneLayoutOffByOne: {model_checks.cache_layouts_agree},
    ExamplesMissAStage: {model_checks.examples_call_every_stage},
    StepsFromOne: {model_checks.steps_count_from_zero_to_their_total},
    WrongGrid: {model_checks.pictures_have_the_declared_size},
    SharedRandomness: {model_checks.an_image_does_not_depend_on_its_batch},
    SharedSettings: {model_checks.an_image_does_not_depend_on_its_batch},
    SeedIgnored: {model_checks.seeds_decide_images},
    LooksAtValues: {model_checks.a_recorded_loop_equals_a_plain_one},
    UploadsInTheLoop: {model_checks.a_recorded_loop_equals_a_plain_one},
    KeyOfItsOwn: {model_checks.orders_are_cut_by_their_keys},
}


def failed(made: UnderTest) -> set[object]:
    """Return the checks that a family does not pass."""
    found = set[object]()
    for check in MODEL_CHECKS:
        try:
            check(made)
        except (AssertionError, NspError):  # anything else is a fault of the check
            found.add(check)
    return found


@pytest.mark.parametrize("family", BROKEN, ids=lambda family: family.__name__)
def test_a_broken_family_fails_its_check_and_no_other(
    family: type[AnyFamily], tmp_path: Path
) -> None:
    assert failed(UnderTest(family(), tmp_path)) == BROKEN[family]


def test_settings_that_change_on_their_way_fail_the_round_trip(tmp_path: Path) -> None:
    made = UnderTest(SettingLost(), tmp_path)
    made.pipeline.sampling = Forgetful(own=2.0)
    with pytest.raises(AssertionError, match="changes on its way"):
        model_checks.configurations_and_checkpoints_round_trip(made)


class Exported(nn.Module):
    """A stage that computes something else where it is traced for export."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *feeds):
        outputs = self.inner(*feeds)
        if torch.compiler.is_exporting():
            return (outputs[0] * 1.01, *outputs[1:])
        return outputs


class OtherWhenExported(ChangedModules):
    def change(self, modules):
        modules["text_encoder"] = Exported(modules["text_encoder"])


class MergesEqualPrompts(Var):
    """Makes one image of all orders for the same prompt."""

    def inputs(self, config, orders, text):
        first = {order.condition: order for order in reversed(orders)}
        return super().inputs(config, [first[order.condition] for order in orders], text)


class NeedsTorch(Var):
    def loop(self, backend, config, inputs):
        import torch

        assert torch.__version__
        yield from super().loop(backend, config, inputs)


class LearnsByChance(VarLearner):
    """Its loss is weighed by numbers that go on from the start of the process."""

    def objective(self, *arguments, **settings):
        made = super().objective(*arguments, **settings)
        computed = made.forward

        def forward(batch):
            found = computed(batch)
            return {**found, "loss": found["loss"] * (1 + random.random())}

        made.forward = forward
        return made


class LearnsOtherwiseWhenResumed(Var):
    @property
    def learner(self):
        return LearnsByChance()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> UnderTest:
    return UnderTest(Var(), tmp_path_factory.mktemp("sound"))


@pytest.fixture
def broken(
    sound: UnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[type[AnyFamily]], UnderTest]]:
    """Give a function that puts a family in the place of `var`, on the sound one's engines."""

    def made(family: type[AnyFamily], *, engines: bool = True) -> UnderTest:
        place = f"{family.__module__}:{family.__name__}"
        monkeypatch.setitem(registry.BUILT_IN, "var", place)  # type: ignore[arg-type]
        registry.family.cache_clear()
        (tmp_path / "sitecustomize.py").write_text(  # for processes that the check starts
            f"from nsp.family import registry; registry.BUILT_IN['var'] = {place!r}\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        found = UnderTest(family(), tmp_path / "made")
        if engines:
            found.__dict__ |= {"engines": sound.engines, "checkpoint": sound.checkpoint}
        return found

    yield made
    monkeypatch.undo()
    registry.family.cache_clear()


def test_a_graph_that_computes_something_else_fails_the_export(broken) -> None:
    with pytest.raises(ParityError, match="text_encoder"):
        run_checks.exported_stages_equal_pytorch(broken(OtherWhenExported, engines=False))


def test_a_loop_that_imports_torch_fails_on_engines(broken) -> None:
    with pytest.raises(AssertionError, match="torch"):
        run_checks.engines_need_no_torch(broken(NeedsTorch))


def test_two_images_of_one_prompt_that_are_one_fail_the_verbs(broken) -> None:
    with pytest.raises(AssertionError, match="the same"):
        run_checks.the_verbs_run(broken(MergesEqualPrompts))


def test_training_by_chance_fails_the_resumption(broken) -> None:
    with pytest.raises(AssertionError, match="differ"):
        run_checks.a_resumed_run_equals_one_in_one_go(broken(LearnsOtherwiseWhenResumed))
