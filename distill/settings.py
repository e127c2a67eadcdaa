"""The base of every block of settings, and the kinds of numbers that they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
LARGEST = 2**53
"""The largest number that JSON and floats hold exactly; more of anything is a mistake."""
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]


def _without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{value} stands there twice; name it once")
    return values


Distinct = AfterValidator(_without_repeats)
"""For a list of what is examined: everything that is named twice would be made, charged and reported twice."""


class Settings(BaseModel):
    """Base of every block: frozen, strict, documented by the strings under its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_bools(cls, given: Any) -> Any:
        """Pydantic takes true for the number 1: of ``steps: true`` it would make a stage of one step."""
        for name, field in cls.model_fields.items() if isinstance(given, Mapping) else ():
            value, types = given.get(name), [*_types(field.annotation)]
            held = value if isinstance(value, list | tuple) else (value,)
            takes_numbers = (int in types or float in types) and bool not in types
            if takes_numbers and any(isinstance(one, bool) for one in held):
                raise ValueError(f"{name} has true or false, and is no setting that is on or off")
        return given


def _types(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of."""
    parts = get_args(annotation)
    yield from (one for part in parts for one in _types(part)) if parts else (annotation,)
