"""The base class of every section of the configuration, and types that several sections share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class BrokenRules(ValueError):
    """Every rule between fields that one section breaks; each text begins with a field's path within the section."""

    def __init__(self, rules: list[str]) -> None:
        super().__init__("; ".join(rules))
        self.rules = rules


class Section(BaseModel):
    """One section of the configuration; a component receives its own section, never the whole."""

    removed: ClassVar[Mapping[str, str]] = {}
    """Fields of earlier releases, with what takes their place."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    def broken_rules(self) -> Iterator[str]:
        """Yield one line for each rule between fields that is broken: `field=value`, rule, remedy."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_broken_rules(self) -> Self:
        if rules := list(self.broken_rules()):
            raise BrokenRules(rules)
        return self


@dataclass(frozen=True)
class Accepts:
    """Metadata of a field's type: what the field accepts, in words, if its validator is a function."""

    text: str


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def variable_name(name: str) -> str:
    """Return the name of an environment variable; raise ValueError, without the text, if it is none."""
    if not _VARIABLE.fullmatch(name):
        raise ValueError(
            "must be the name of an environment variable (the value is not shown: it may be a secret); correct it"
        )
    return name


EnvironmentNames = Annotated[
    tuple[Annotated[str, AfterValidator(variable_name)], ...],
    Accepts("a list of names of environment variables"),
    Field(repr=False),
]
"""Names of environment variables. They are not shown in messages: a user may have written a secret instead."""
