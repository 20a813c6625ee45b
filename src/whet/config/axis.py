"""What the sections of the policy-gradient space have in common: no key may be misspelled, nothing changes later."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Axis(BaseModel):
    """A section of `algorithm`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
