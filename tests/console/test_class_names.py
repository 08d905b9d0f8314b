"""Classes are given by the names of their folders."""

import pytest

from nsp.console.settings import class_numbers
from nsp.errors import ConfigError
from nsp.families.var.config import size, with_condition
from nsp.family.classes import ClassCondition
from nsp.family.registry import family

NAMES = ("Dog", "Golden Retriever", "dog", "golden-retriever")


def numbers(*names: str) -> tuple[int, ...]:
    condition = ClassCondition(num_classes=len(NAMES), id2label=NAMES)
    config = with_condition(size("tiny"), condition)
    return class_numbers(family("var"), config.to_dict(), names)


def test_a_name_is_its_own_class_where_only_upper_case_tells_two_apart() -> None:
    assert numbers("Dog", "dog", "golden retriever") == (0, 2, 1)
    with pytest.raises(ConfigError, match="--class 'DOG' may be 'Dog' or 'dog'"):
        numbers("DOG")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'goldn retriever' is unknown, nearest is Golden"):
        numbers("goldn retriever")
