"""Configuration records: what is wrong with a value is said in a user's words."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from nsp.config import Config
from nsp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Part(Config):
    size: int


@dataclass(frozen=True, kw_only=True)
class Whole(Config):
    name: str
    mode: Literal["fast", "slow"] = "fast"
    ratio: float = 1.0
    count: int | None = None
    flag: bool = False
    pair: tuple[float, ...] = (0.0, 1.0)
    parts: tuple[Part, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "up"}, "Whole.mode: 'up' is not allowed; expected one of fast, slow"),
        ({"mode": np.array(["a", "b"])}, "Whole.mode: ['a', 'b'] is not allowed"),
        ({"ratio": "x"}, "Whole.ratio: 'x' is not allowed; expected a number"),
        ({"ratio": 10**400}, "Whole.ratio: an integer of 1329 bits is too large"),
        ({"count": 1.5}, "Whole.count: 1.5 is not allowed; expected an integer"),
        ({"flag": 1}, "Whole.flag: 1 is not allowed; expected true or false"),
        ({"pair": 3}, "Whole.pair: 3 is not allowed; expected a list (a number each)"),
        ({"pair": [0, "x"]}, "Whole.pair[1]: 'x' is not allowed; expected a number"),
        ({"parts": [{"size": 1}, {}]}, "Whole.parts[1]: Part: key 'size' is missing"),
        ({"notes": []}, "Whole.notes: [] is not allowed; expected an object"),
        ({"nmae": 1}, "Whole: unknown key 'nmae'; known: name, mode"),
        ({1: 1}, "Whole: unknown key 1; known: name, mode"),
        ({"name": None}, "Whole.name: None is not allowed; expected text"),
        ({"name": ["x"] * 999}, "…"),
    ],
)
def test_a_wrong_value_is_named_in_words(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Whole.from_dict({"name": "a", **values})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="Whole: key 'name' is missing"):
        Whole.from_dict({})


def test_numpy_numbers_become_pythons() -> None:
    given = {
        "name": np.str_("a"),
        "ratio": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "pair": np.array([0.25, 0.75]),
    }
    whole = Whole.from_dict(given)
    assert whole == Whole(name="a", ratio=0.5, count=3, flag=True, pair=(0.25, 0.75))
    assert {type(value) for value in whole.pair} == {float}
    assert [type(v) for v in (whole.ratio, whole.count, whole.flag)] == [float, int, bool]
    made = Whole(name="a", count=np.int64(3))  # as its constructor takes what it is given
    assert type(made.to_dict()["count"]) is int
