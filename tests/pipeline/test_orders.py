"""Orders made from what users give: seeds, kinds of conditions, and batches of equal keys."""

from typing import Any

import numpy as np
import pytest

from nsp.console.prompt_lists import ListedImage
from nsp.console.settings import planned_orders
from nsp.errors import ConfigError
from nsp.families.var.sampling import VarSampling
from nsp.family.order import Order
from nsp.pipeline.orders import cut_batches, make_orders
from nsp.pipeline.pipeline import Pipeline, load_pipeline

SETTINGS = VarSampling()


@pytest.fixture(scope="module")
def pipe(tiny_class_checkpoint) -> Pipeline:
    return load_pipeline(tiny_class_checkpoint, device="cpu")


def seeds(**given):
    return [(order.condition, order.seed) for order in make_orders(SETTINGS, **given)]


def test_the_kth_image_of_a_condition_has_seed_plus_k():
    expected = [("a", 5), ("a", 6), ("b", 5), ("b", 6), ("a", 7), ("a", 8)]
    assert seeds(prompts=["a", "b", "a"], seed=5, num_images=2) == expected


def test_a_list_of_seeds_gives_each_image_its_own_and_fits():
    assert seeds(prompts=["a", "b"], seed=[9, 3]) == [("a", 9), ("b", 3)]
    assert seeds(class_ids=[4], seed=np.array([9, 3]), num_images=2) == [(4, 9), (4, 3)]
    with pytest.raises(ConfigError, match="seed has 3 numbers for 2 images"):
        seeds(prompts=["a", "b"], seed=[1, 2, 3])


def test_without_a_condition_a_list_of_seeds_says_how_many_images():
    assert seeds(seed=[9, 3]) == [(None, 9), (None, 3)]
    assert seeds(seed=5, num_images=2) == [(None, 5), (None, 6)]
    with pytest.raises(ConfigError, match="seed has 3 numbers for 2 images"):
        seeds(seed=[1, 2, 3], num_images=2)
    with pytest.raises(ConfigError, match="seed has 0 numbers for 1 images"):
        seeds(seed=[])


def test_rows_of_a_list_without_conditions_are_images_with_settings_of_their_own():
    rows = [ListedImage(settings={"top_k": 3}), ListedImage(seed=40), ListedImage()]
    plan = {"prompts": [], "class_ids": [], "seed": 5, "negative": None}
    orders = planned_orders(SETTINGS, rows, num_images=2, **plan)
    assert [order.seed for order in orders] == [5, 6, 40, 41, 7, 8]
    assert [order.sampling.top_k for order in orders] == [3, 3, 0, 0, 0, 0]
    assert {order.condition for order in orders} == {None}
    assert len(planned_orders(SETTINGS, [], num_images=2, **plan)) == 2


def test_cutting_keeps_every_image_and_equal_keys_together(pipe):
    plain = make_orders(pipe.sampling, class_ids=range(5))
    smooth = make_orders(pipe.sampling.changed({"more_smooth": True}), class_ids=range(2))
    mixed = [plain[0], smooth[0], *plain[1:], smooth[1]]
    assert cut_batches(pipe, mixed, 3) == [[0, 2, 3], [1, 6], [4, 5]]
    with pytest.raises(ConfigError, match="cannot share a batch"):
        pipe.run(mixed[:2])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts": (), "class_ids": ()}, "nothing to generate"),
        ({"prompts": ("a",), "class_ids": (1,)}, "both"),
        ({"num_images": 0}, "num_images must be an integer of at least 1, not 0"),
        ({"num_images": 1.5}, "num_images"),
        ({"seed": None}, "seed=None"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed=18446744073709551616"),
        ({"prompts": "cat"}, "prompts must be a list of texts"),
        ({"prompts": [None]}, "prompt 1 is None"),
        ({"prompts": None, "class_ids": [1.5]}, "list of integers"),
        ({"negative": ["a", "b"]}, "negative_prompt has 2 texts for 1 prompts"),
        ({"negative": [3]}, "negative_prompt 3 is not a text"),
    ],
)
def test_orders_of_something_else_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        make_orders(SETTINGS, **{"prompts": ["cat"], **given})


def test_no_batch_is_empty(pipe):
    with pytest.raises(ConfigError, match="batch_size"):
        cut_batches(pipe, make_orders(SETTINGS, class_ids=[1]), 0)
    with pytest.raises(ConfigError, match="nothing to generate"):
        pipe.run([])


def test_a_row_of_a_list_may_have_its_own_seed_settings_and_negative_prompt():
    rows = [
        ListedImage(prompt="b", seed=40, settings={"top_k": 3}, negative="blurry"),
        ListedImage(prompt="a", where="list.csv, line 3", settings={"guidance_scale": 4}),
    ]
    orders = planned_orders(
        SETTINGS, rows, prompts=["a"], class_ids=[], seed=5, num_images=2, negative=None
    )
    assert [order.seed for order in orders] == [5, 6, 40, 41, 7, 8]
    assert [order.sampling.top_k for order in orders] == [0, 0, 3, 3, 0, 0]
    assert [order.sampling.guidance_scale for order in orders] == [2, 2, 2, 2, 4, 4]
    assert [order.negative for order in orders] == [None, None, "blurry", "blurry", None, None]
    wrong = [ListedImage(prompt="a", where="list.csv, line 3", settings={"top_p": 7})]
    with pytest.raises(ConfigError, match=r"list\.csv, line 3: top_p=7"):
        planned_orders(
            SETTINGS, wrong, prompts=[], class_ids=[], seed=0, num_images=1, negative=None
        )


def test_a_top_k_beyond_what_a_backend_sorts_is_refused_before_the_first_image(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe.backend, "max_ranks", 3)
    orders = make_orders(pipe.sampling.changed({"top_k": 5}), class_ids=[1])
    with pytest.raises(ConfigError, match="top_k=5 is more than backend torch can sort"):
        pipe.check(orders)


@pytest.mark.parametrize(
    ("condition", "words"),
    [(1.5, "a class id is an integer"), (True, "a class id is an integer"), ("a", "class ids")],
)
def test_a_condition_of_the_wrong_kind_is_one_line(
    pipe: Pipeline, condition: object, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipe.check([Order(condition, 0, pipe.sampling)])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"orders is a list of nsp\.Order"):
        pipe.check([condition])  # type: ignore[list-item]


@pytest.mark.parametrize("seed", ["a", -1, 2**64, 1.0, True, None])
def test_an_order_with_a_seed_that_is_none_is_refused_when_it_is_made(seed: Any) -> None:
    with pytest.raises(ConfigError, match=r"^seed=.* must be an integer between 0 and 2\*\*64 - 1"):
        Order("red apple", seed, SETTINGS)


def test_an_order_takes_numbers_of_numpy_and_no_other_kind_of_given(pipe: Pipeline) -> None:
    condition: Any
    seed: Any
    given: Any
    condition, seed, given = (np.int64(1), np.uint8(3), 3)
    order = Order(condition, seed, pipe.sampling)
    assert (type(order.condition), type(order.seed)) == (int, int)
    pipe.check([order])
    with pytest.raises(ConfigError, match="given=3 must map names to arrays"):
        Order(1, 0, pipe.sampling, given=given)


def test_greedy_settings_say_that_seeds_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    make_orders(SETTINGS.changed({"top_k": 1}), prompts=["cat"], num_images=2)
    assert "top_k=1 is greedy: all seeds give the same picture" in caplog.text
