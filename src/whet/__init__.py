"""whet: post-training for language models, from SFT to RL, in one system.

From Python: `run` and `train` do what `whet run` does, and `Run` reads what came of it. The architecture is in
`records`, the `base` modules, `pipeline.stage` and `launch.world`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whet.launch.python import run as run
    from whet.launch.python import train as train
    from whet.launch.results import RunResults

    Run = RunResults

__version__ = "0.1.0"

_LAZY = {"run": "python.run", "train": "python.train", "Run": "results.RunResults"}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for, so that `import whet` takes no time."""
    if name not in _LAZY:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(".")
    return getattr(import_module(f"whet.launch.{module}"), attribute)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
