"""whet: post-training for language models, from SFT to RL, in one system.

The architecture is in `records`, the `base` modules, `pipeline.stage` and `launch.world`.
"""

from whet.errors import EnvironmentFailure as Broken

__all__ = ["Broken"]
__version__ = "0.1.0"
