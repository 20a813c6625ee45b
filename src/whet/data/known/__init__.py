"""Published data sets whose rows have a shape of their own, made into rows of our formats.

They are recognised where the recipe says neither `data.columns` nor `data.format`. A row's other columns stay beside
ours. What is no example of what is asked for, a tie between two answers, is counted and never an error.
"""

from whet.data.known.answers import ANSWERS, RATINGS
from whet.data.known.base import Known, unfold
from whet.data.known.code import CODE
from whet.data.known.steps import STEPS
from whet.data.known.tasks import TASKS

TURNS: Known = {**ANSWERS, **CODE}
"""Rows with a prompt, and for most an answer."""

__all__ = ["ANSWERS", "RATINGS", "STEPS", "TASKS", "TURNS", "Known", "unfold"]
