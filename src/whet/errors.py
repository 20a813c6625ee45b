"""One exception class per boundary, and `boundary()`, which attributes whatever crosses it.

`UserError` and its children are the user's to mend, and so is a `SamplerError` that could not be attributed to one
answer: the command line prints them as one line and exits with `exit_code`. Anything else that reaches the top is our
bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the program is wrong; the message names the place and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe or an override does not say what it must."""

    exit_code = 2


class DataError(UserError):
    """A row, a file or a data set cannot be used."""

    exit_code = 3


class ModelError(UserError):
    """A model directory, tokenizer or template is missing something or is of an unknown kind."""

    exit_code = 4


class MissingExtra(UserError):
    """An optional dependency is needed; the message is the pip command."""

    exit_code = 5


class RunError(UserError):
    """A run folder cannot be used: locked, of another recipe, damaged, read-only or out of space."""

    exit_code = 6


class RewardError(UserError):
    """A reward function cannot be loaded, or keeps failing."""

    exit_code = 7


class TrainingError(UserError):
    """Training cannot go on: numbers are not finite, or no step has a signal."""

    exit_code = 8


class SandboxError(UserError):
    """No sandbox can be had, or not with the protections that were asked for."""

    exit_code = 10


class SamplersLost(UserError):
    """Too few sampler processes are left, or none of them answers within its deadline."""

    exit_code = 11


class GraderError(Exception):
    """Grading code failed; says nothing about the answer."""


class EnvironmentFailure(Exception):
    """An environment's machinery failed; says nothing about the policy. Environments raise it as `whet.Broken`."""


class PolicyFault(Exception):
    """The policy's own text broke its environment."""


class SamplerError(Exception):
    """A sampler or an endpoint failed; says nothing about the policy."""

    exit_code = 9


INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, with everything up to the last step saved."""


@contextmanager
def boundary(kind: type[Exception], what: str) -> Iterator[None]:
    """Attribute whatever escapes this block to one kind of failure."""
    try:
        yield
    except (kind, UserError):
        raise
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}: {error}") from error
