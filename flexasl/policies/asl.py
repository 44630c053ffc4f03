"""Adaptive layer selection."""

from __future__ import annotations

from flexasl.policies.base import Policy


class ASL(Policy):
    """Selects tokens once, at the first layer at which their ranking has settled (ASL, arXiv 2601.07667)."""

    name = "asl"
    takes_profiles = True
