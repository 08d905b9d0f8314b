"""Configuration records: what is wrong with a value is said in a user's words."""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from nsp.config import Config
from nsp.errors import ConfigError
from nsp.families.var.sampling import VarSampling
from nsp.family.registry import family, family_names


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
        ({"nmae": 1}, "Whole: unknown key 'nmae', nearest is name; known: name, mode"),
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


ODD: tuple[Any, ...] = (
    -1, 0, 3, 1.5, -0.5, 1e-300, 1e308, -1e308, float("inf"), float("nan"), 2**20 + 1, 2**31, 2**63,
    10**30, True, None, "x", {}, [], [10**9], [1] * 100_000,
)  # fmt: skip


def places_of(values: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where numbers, and lists of them, lie in nested plain values."""
    if isinstance(values, dict | list):
        inside = values.items() if isinstance(values, dict) else enumerate(values)
        found = [place for key, value in inside for place in places_of(value, (*where, key))]
        return [where, *found] if isinstance(values, list) else found
    is_number = isinstance(values, int | float) and not isinstance(values, bool)
    return [where] if is_number else []


def with_value(values: Any, where: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of nested plain values with another one in a place."""
    changed = place = copy.deepcopy(values)
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    return changed


def tiny(name: str) -> dict[str, Any]:
    """Return the tiny configuration of a family, or settings of sampling, as a file has them."""
    if name == "sampling":
        return VarSampling(guidance_schedule="interval", guidance_until=2).to_dict()
    values: dict[str, Any] = family(name).sizes["tiny"].to_dict()
    return values


def made(record: Any, values: dict[str, Any]) -> tuple[Any, str]:
    """Return the record of plain values, or the line that refuses them."""
    try:
        return record.from_dict(values), ""
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("name", [*family_names(), "sampling"])
def test_a_number_is_refused_in_one_line_or_leaves_a_model_that_can_be_described(name: str) -> None:
    record = VarSampling if name == "sampling" else family(name).config
    for place in places_of(tiny(name)):
        for value in ODD:
            config, said = made(record, with_value(tiny(name), place, value))
            assert len(said) < 1000, (place, value)
            if said:
                continue
            if name == "sampling":
                assert len(config.guidance_per_scale(4)) == 4
                assert config.num_ranks(50) <= 50
            else:
                assert family(name).stages_io(config, kv_layout="delta", dtype="float32")


@pytest.mark.parametrize(
    ("owner", "part", "name", "values"),
    [
        ("var", "predictor", "mlp_ratio", [1e308, 1e9, -1.0, 0.0]),
        ("var", "predictor", "norm_eps", [1e-300, 0.5, 1e308]),
        ("var", "vae", "commitment_weight", [1e308, 1e30]),
        ("var", "vae", "channel_multipliers", [[1] * 100_000, [1, 2**63]]),
        ("next_scale", "vae", "scaling_factor", [1e308, 1e-300, 1e30, 0]),
        ("next_scale", "vae", "block_out_channels", [[8] * 100_000, [8, 2**63]]),
        ("next_scale", "generator", "flow_steps", [2**20, 0]),
    ],
)
def test_a_number_that_no_arithmetic_survives_is_named(
    owner: str, part: str, name: str, values: list[Any]
) -> None:
    record = family(owner).config
    record.from_dict(tiny(owner))
    for value in values:
        with pytest.raises(ConfigError, match=name) as caught:
            record.from_dict(with_value(tiny(owner), (part, name), value))
        assert len(str(caught.value)) < 300
