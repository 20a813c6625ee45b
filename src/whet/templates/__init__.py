"""Templates: the only way between messages and tokens."""

from whet.templates.base import LossOn, Rendered, Template
from whet.templates.jinja import JinjaTemplate

__all__ = ["JinjaTemplate", "LossOn", "Rendered", "Template"]
