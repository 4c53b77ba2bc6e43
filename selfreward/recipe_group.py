"""What the groups of a recipe's keys are made of: numbers with their ranges, and what every group can do."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from engine import InputError
from selfreward.recipe_errors import FORMS

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

T = TypeVar("T")
_form = Discriminator(lambda value: FORMS[isinstance(value, list)])
EachRound = Annotated[Annotated[T, Tag(FORMS[0])] | Annotated[list[T], Tag(FORMS[1])], _form]


class Group(BaseModel):
    """Keys that belong together. Those in `per_round` may be a list with a value for each round."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    per_round: ClassVar[tuple[str, ...]] = ()

    def by_round(self) -> dict[str, list[Any]]:
        """The keys that are lists with a value for each round."""
        return {name: value for name in self.per_round if isinstance(value := getattr(self, name), list)}

    def of_round(self, k: int) -> dict[str, Any]:
        """The values as round `k` has them, from 1."""
        return self.model_dump() | {name: values[k - 1] for name, values in self.by_round().items()}


class Switched(Group):
    """A group that is off as long as the key `switch` is 0: without it the other keys have no effect and are refused. `off`
    says what 0 means."""

    switch: ClassVar[str]
    off: ClassVar[str]

    @model_validator(mode="after")
    def _on(self) -> Self:
        unused = self.model_fields_set - {self.switch}
        if unused and self.switch not in self.model_fields_set:
            raise InputError(
                f"{' and '.join(sorted(unused))} has no effect without {self.switch}, which is missing; set it "
                f"(0: {self.off})"
            )
        return self
