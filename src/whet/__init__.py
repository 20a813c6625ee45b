"""whet: post-training for language models, from SFT to RL, in one system.

From Python: `run` and `train` do what `whet run` does, and `Run` reads what came of it. The architecture is in
`records`, the `base` modules, `pipeline.stage` and `launch.world`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from whet.errors import EnvironmentFailure as Broken

if TYPE_CHECKING:
    from whet.launch.python import RunResults as Run
    from whet.launch.python import run, train

__version__ = "0.1.0"

__all__ = ["Broken", "Run", "__version__", "run", "train"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for, so that `import whet` takes no time."""
    if name not in __all__:
        raise AttributeError(f"module 'whet' has no attribute {name!r}; there are {', '.join(__all__)}")
    return getattr(import_module("whet.launch.python"), "RunResults" if name == "Run" else name)
