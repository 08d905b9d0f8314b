"""The condition of models with classes; without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nsp.config import Config
from nsp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ClassCondition(Config):
    """One learned embedding per class; index `num_classes` is the null class."""

    num_classes: int
    id2label: tuple[str, ...] = ()  # the name of every class, by its number; empty: not known
    kind: Literal["class"] = "class"

    def __post_init__(self) -> None:
        """Check the numbers."""
        self.check_counts("condition", "num_classes")
        if self.id2label and len(self.id2label) != self.num_classes:
            raise ConfigError(
                f"condition: {len(self.id2label)} names in id2label for {self.num_classes} classes"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary; without names it is that of models that never had any."""
        values = super().to_dict()
        return values if self.id2label else {n: values[n] for n in values if n != "id2label"}


def classes_of(condition: ClassCondition, names: Sequence[str]) -> ClassCondition:
    """Return the condition for pictures of these classes.

    A model of one class is unconditional and stays so. Classes that have only numbers ("0", "1",
    ...) do not tell how many the model should have.
    """
    is_named = list(names) != [str(number) for number in range(len(names))]
    if condition.num_classes == 1 or not names or not is_named:
        return condition
    return ClassCondition(num_classes=len(names), id2label=tuple(names))
