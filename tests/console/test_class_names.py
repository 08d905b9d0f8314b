"""Classes are given by the names of their folders."""

from typing import Any

import pytest

from nsp.console.prompt_lists import ListedImage
from nsp.console.settings import class_numbers, with_class_numbers
from nsp.errors import ConfigError
from nsp.families.var.config import size, with_condition
from nsp.family.classes import ClassCondition
from nsp.family.registry import family

NAMES = ("Dog", "Golden Retriever", "dog", "golden-retriever")


def config(names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    condition = ClassCondition(num_classes=len(NAMES), id2label=names)
    return with_condition(size("tiny"), condition).to_dict()


def numbers(*names: str) -> tuple[int, ...]:
    return class_numbers(family("var"), config(), names)


def test_a_name_is_its_own_class_where_only_upper_case_tells_two_apart() -> None:
    assert numbers("Dog", "dog", "golden retriever") == (0, 2, 1)
    with pytest.raises(ConfigError, match="--class 'DOG' may be 'Dog' or 'dog'"):
        numbers("DOG")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'goldn retriever' is unknown, nearest is Golden"):
        numbers("goldn retriever")


def test_names_in_a_list_are_the_same_classes_and_a_wrong_one_is_named_with_its_line() -> None:
    rows = [ListedImage(class_name="golden retriever", seed=3), ListedImage(class_id=3)]
    assert with_class_numbers(family("var"), config(), rows) == (
        ListedImage(class_id=1, seed=3),
        ListedImage(class_id=3),
    )
    wrong = [ListedImage(class_name="goldn retriever", where="a.csv, line 2")]
    with pytest.raises(ConfigError, match=r"^a\.csv, line 2: class 'goldn .*, nearest is Golden"):
        with_class_numbers(family("var"), config(), wrong)
    with pytest.raises(ConfigError, match=r"^a\.csv, line 2: .* no names of classes; give numbers"):
        with_class_numbers(family("var"), config(names=()), wrong)
