"""Rewards that the environment of a task gives."""

from __future__ import annotations

from whet.envs.base import Attempt, Grade


def of_environment(attempt: Attempt) -> Grade:
    """The sum of what the environment says that the play was worth; not applicable where it says nothing."""
    if not attempt.worth:
        return Grade(value=None)
    parts = attempt.worth if len(attempt.worth) > 1 else {}
    return Grade(value=sum(attempt.worth.values()), metrics=parts)


def of_turns(attempt: Attempt) -> Grade:
    """The sum of the rewards of single turns, and each of them."""
    return Grade(value=sum(attempt.turn_rewards), turns=attempt.turn_rewards)


def calls(attempt: Attempt) -> Grade:
    """How many calls the policy tried."""
    return Grade(value=float(sum(len(message.tool_calls) for message in attempt.messages)))
