"""Adaptive layer selection."""

from __future__ import annotations

from flexasl.policies.base import Policy


class ASL(Policy):
    """Selects tokens at the layers at which the question finds a far token; with `settled_by="variance"` once, at the
    first layer at which their ranking has settled (ASL, arXiv 2601.07667)."""

    name = "asl"
    takes_profiles = True
