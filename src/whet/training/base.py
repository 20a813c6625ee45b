"""The training door: few verbs, and objectives that are values.

`forward_backward(atoms, objective)` adds the gradient of `sum over rows of sum(weight * loss)`. There is no division:
the `weight` column was written over the whole step by `formulas.step`, before anything was split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from whet.models.language import Want
from whet.records import Atom, Column, Metric, TokenRow

REFERENCE = "reference"
"""The frozen model that a KL or a preference is measured from: a copy, or an adapter's base."""
TEACHER = "teacher"
"""The frozen model that a student is distilled from."""

Need = Literal["logp", "entropy", "entropy_grad", "value", "score", "top_k"]
"""What an objective may ask of the forward pass. Log-probabilities are implied, unless values or scores are asked for:
a scalar model has no vocabulary to have them over. `top_k`: also of the tokens in the rows' column `top_k/ids`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What the model says of the trained tokens of a micro-batch. Legend: T trained tokens, K outputs of a head."""

    logp_T: Tensor
    """log p(token | past), float32 or wider, with gradient; NaN for an objective that asks for scalars alone."""
    entropy_T: Tensor | None = None
    """Entropy of the distribution that predicts the token, without gradient unless `entropy_grad` is needed; None
    unless the objective needs it."""
    value_T: Tensor | None = None
    """Value of the state that the token is chosen in, with gradient; None unless the objective needs it."""
    top_k_TK: Tensor | None = None
    """log p of the tokens in the column `top_k/ids`, with gradient; None unless the objective needs it."""
    score_TK: Tensor | None = None
    """What the head says having read the token (a reward at the end of an answer or of a step), with gradient; None
    unless the objective needs it. K is 1 but for models of several objectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The numbers of a micro-batch's trained tokens. Legend: T trained tokens, R rows."""

    weight_T: Tensor
    row_T: Tensor
    """Which row (0..R-1) each trained token belongs to."""
    rows: int
    atom_R: Tensor
    """Which atom each row belongs to."""
    columns: Mapping[str, Tensor]
    """The other columns of the rows, each (T,) or (T, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """A metric inside the graph: sum and count, detached."""

    total: Tensor
    weight: Tensor


class Objective(Protocol):
    """`(outputs, batch) -> (scalar, metrics)`, linear in the batch's weights. A picklable value, not a name.

    A class that inherits from it says only what is other than here.
    """

    compares: ClassVar[bool] = False
    """Whether it compares the rows of an atom, which must then be in one micro-batch; any other may be cut."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the forward pass must compute for it; nothing else is computed."""
        return frozenset()

    @property
    def temperature(self) -> float:
        """What the logits are divided by before log-softmax; the sampler's own for RL."""
        return 1.0

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Mapping[str, Tally]]:
        """The weighted sum of losses of a micro-batch, and its metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimResult:
    """What an optimizer step did."""

    applied: bool
    """False: the gradient was not finite, so the step was skipped and the weights are as before."""
    grad_norm: float
    """Norm before clipping."""
    not_finite: str = ""
    """The first parameter whose gradient was not finite, where the step was skipped."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Trainer(Protocol):
    """Weights and optimizer behind few verbs. Local, FSDP or remote: the loop cannot tell."""

    def forward_backward(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """Add the gradient of the objective over all rows; may be called several times before a step."""

    def optim_step(self, lr_factor: float | None) -> OptimResult:
        """Clip, step at this share of the peak learning rates, clear the gradients. None: measure and clear them."""

    def evaluate(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """The metrics of `forward_backward`, without a gradient."""

    def forward(
        self, rows: Sequence[TokenRow], *want: Want, temperature: float = 1.0, frozen: str | None = None, top_k: int = 0
    ) -> dict[str, list[Column]]:
        """Columns of the trained tokens, one array per row, without a gradient.

        `logp`, `entropy` (nats) and `value` (of the state before the token) are (T,); `score` (the head's outputs
        having read the token) is (T, K); `top_k` gives `top_k/ids` and `top_k/logp`, (T, top_k). Under the weights as
        they are, or under the `frozen` model of that name.
        """

    def update_frozen(self, name: str, decay: float) -> None:
        """Move the frozen copy `name` by an EMA: `decay` of itself, the rest the weights as they are (0: a copy)."""

    def save(self, folder: Path) -> None:
        """Weights, optimizer state and whatever else `load` needs for a bit-exact continuation."""

    def load(self, folder: Path) -> None:
        """Continue from `save`."""

    def export(self, folder: Path) -> None:
        """Weights and tokenizer in the Hugging Face layout (an adapter in peft's)."""
