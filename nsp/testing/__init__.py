"""A conformance suite: what any family must keep, checked on its size "tiny".

    import pytest
    from nsp.testing import CHECKS, UnderTest

    @pytest.fixture(scope="module")
    def made(tmp_path_factory):
        return UnderTest(MyFamily(), tmp_path_factory.mktemp("mine"))

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_family(check, made):
        check(made)

or, of an installed family, `python -m nsp.testing my_family`. A check raises AssertionError saying
what is wrong; its name and docstring are the promise.
"""

from collections.abc import Callable
from typing import TypeAlias

from nsp.testing import model_checks, run_checks
from nsp.testing.under_test import UnderTest

Check: TypeAlias = Callable[[UnderTest], None]

# Without files or further processes.
MODEL_CHECKS: tuple[Check, ...] = (
    model_checks.modules_match_their_declaration,
    model_checks.every_weight_has_one_precision,
    model_checks.examples_call_every_stage,
    model_checks.steps_count_from_zero_to_their_total,
    model_checks.pictures_have_the_declared_size,
    model_checks.cached_equals_full_pass,
    model_checks.cache_layouts_agree,
    model_checks.an_image_does_not_depend_on_its_batch,
    model_checks.seeds_decide_images,
    model_checks.a_recorded_loop_equals_a_plain_one,
    model_checks.orders_are_cut_by_their_keys,
    model_checks.configurations_and_checkpoints_round_trip,
)
CHECKS: tuple[Check, ...] = (
    *MODEL_CHECKS,
    run_checks.exported_stages_equal_pytorch,
    run_checks.engines_need_no_torch,
    run_checks.the_verbs_run,
    run_checks.a_resumed_run_equals_one_in_one_go,
)

__all__ = ["CHECKS", "MODEL_CHECKS", "Check", "UnderTest"]
