"""The base of our config classes: strict about keys, values and options not in use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    model_validator,
)

SECTION = "local_parallel"


class OptionOf(NamedTuple):
    """Marks a key that means something for some values of another key of its object only."""

    key: str
    values: tuple[str, ...]


def _plain(value: Any) -> Any:
    """JSON has one kind of list, and writes integers as 1e3 too."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Strict(BaseModel):
    """Refuses keys it does not know, values of another kind, NaN, and options not in use."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of keys -> what they are called now. Both are read for two minor versions."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = {key: _plain(value) for key, value in given.items()}
        for old, new in ((o, n) for o, n in cls.renamed.items() if o in given):
            if new in given:
                raise ValueError(f"{old} is the old name of {new}, and both are there: remove it")
            warnings.warn(
                f"{SECTION}: {old} is called {new} now; rename it in the config, since the old "
                "name will be refused one day",
                FutureWarning,
                stacklevel=2,
            )
            given = {new if key == old else key: value for key, value in given.items()}
        return given

    @classmethod
    def options(cls) -> dict[str, OptionOf]:
        """The keys that depend on the value of another key."""
        marks = {name: field.metadata for name, field in cls.model_fields.items()}
        return {n: mark for n, of in marks.items() for mark in of if isinstance(mark, OptionOf)}

    @model_validator(mode="after")
    def _options_in_use(self) -> Strict:
        for name, option in self.options().items():
            value = getattr(self, option.key)
            chosen = {value} if isinstance(value, str) else set(value)
            if name in self.model_fields_set and not chosen & set(option.values):
                raise ValueError(
                    f"{name} means nothing with {option.key} {value!r}; remove it, or set "
                    f"{option.key} to {' or '.join(option.values)}"
                )
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        conditions = []
        for name, option in cls.options().items():
            chosen = {"enum": list(option.values)}
            one_of = {"anyOf": [chosen, {"type": "array", "contains": chosen}]}
            then = {"required": [option.key], "properties": {option.key: one_of}}
            conditions.append({"if": {"required": [name]}, "then": then})
        return schema | ({"allOf": conditions} if conditions else {})
