"""What all sections of a recipe have in common: no key may be misspelled, nothing changes later."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A section of a recipe: immutable, and no key may be misspelled."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )
