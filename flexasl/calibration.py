"""The public names of `flexasl.tools.calibration`."""

from flexasl.tools.calibration import *  # noqa: F403
from flexasl.tools.calibration import __all__ as __all__
