"""What all sections of a recipe have in common: no key may be misspelled, nothing changes later."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Made = Literal["model", "reward", "rows"]
"""What a stage leaves for later ones: a model that speaks, one that judges, or rows."""


class Strict(BaseModel):
    """A section of a recipe: immutable, and no key may be misspelled."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )

    refers_to: ClassVar[Made | None] = None
    """What `path: "@stage"` means in this section; None: its `path`, if it has one, names no stage."""
