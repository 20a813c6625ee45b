"""A user's loss, held to what a formula promises: one number with a gradient for each token or pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whet.config.derived import FromFile
from whet.errors import TrainingError
from whet.formulas.constants import Bound
from whet.formulas.policy import Tokens
from whet.formulas.preference import Pairs
from whet.target import describe
from whet.training.engine import out_of_memory


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """The function that `path` names. `TrainingError` where it fails, or its value is not what it must be."""

    path: str
    function: Callable[..., Any]

    def __call__(self, given: Tokens | Pairs, **constants: Any) -> Tensor:
        """Its value, of the shape of the log-probabilities that it is given."""
        logp = given.logp_T if isinstance(given, Tokens) else given.chosen_P
        try:
            value = self.function(given, **constants)
        except Exception as error:
            if out_of_memory(error):  # it is tried again with fewer rows
                raise
            raise TrainingError(f"the loss {self.path} failed: {describe(error)}") from error
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.shape != logp.shape:
            raise TrainingError(f"the loss {self.path} returned {shape}, and it is given {tuple(logp.shape)} "
                                "log-probabilities; return one number for each, not their mean")  # fmt: skip
        if torch.is_grad_enabled() and not value.requires_grad:
            raise TrainingError(f"the loss {self.path} has no gradient; use the log-probabilities without detach()")
        return value


def own_loss(section: FromFile) -> Bound:
    """The loss of a section, with its constants."""
    return Bound(OwnLoss(section.path, section.function), **section.constants)
