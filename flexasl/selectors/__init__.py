"""Which tokens pass to deeper layers: scores in, selections out."""

from flexasl.selectors.adaptive import LayerSelector
from flexasl.selectors.base import Prompts, Selection, Selector, Trace
from flexasl.selectors.scheduled import ScheduledSelector
from flexasl.selectors.staged import StagedSelector

__all__ = ["LayerSelector", "Prompts", "ScheduledSelector", "Selection", "Selector", "StagedSelector", "Trace"]
