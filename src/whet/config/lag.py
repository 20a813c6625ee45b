"""How far sampling may be ahead of training, and in which order training takes what was sampled."""

from __future__ import annotations

from math import ceil
from typing import Literal

from pydantic import Field

from whet.config.strict import Strict


class LagConfig(Strict):
    """The lag of rollouts: by how many steps their weights may be older than those that they train."""

    steps: int = Field(0, ge=0)
    """L. 0: each step plays its own groups first. 1 and more: those of the next steps are played meanwhile, by samplers
    in processes of their own (`machine.samplers.replicas`) or vLLM servers (`sampling.server`)."""
    order: Literal["exact", "strict", "window"] = "window"
    """exact: the oldest groups first, each sampled at one version known before: bit-reproducible, and slowest. strict:
    the oldest first; new weights are taken in the middle of an answer. window: any of the oldest `window`."""
    window: float = Field(0.3, gt=0, le=1)
    """Share of the (L + 1) x prompts_per_step groups that are admitted at a time."""

    def window_of(self, prompts: int) -> int:
        """W: a step takes groups among the first so many that are not trained yet."""
        return max(1, ceil(self.window * (self.steps + 1) * prompts)) if self.order == "window" else 1

    def bound(self, prompts: int) -> int:
        """The greatest lag of a token in steps, with so many groups a step."""
        return self.steps + ceil((self.window_of(prompts) - 1) / prompts)
