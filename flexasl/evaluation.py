"""The public names of `flexasl.tools.evaluation`."""

from flexasl.tools.evaluation import *  # noqa: F403
from flexasl.tools.evaluation import __all__ as __all__
