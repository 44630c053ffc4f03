"""Which tokens go on to deeper layers: scores in, selections out."""

from flexasl.selectors.adaptive import LayerSelector
from flexasl.selectors.base import Selection, Selector, Trace
from flexasl.selectors.scheduled import ScheduledSelector

__all__ = ["LayerSelector", "ScheduledSelector", "Selection", "Selector", "Trace"]
