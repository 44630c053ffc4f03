"""Adaptive layer selection, then a second prefill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flexasl.config import ASLConfig
from flexasl.policies.base import Policy

NO_TOP_P = "would have no effect where no layer caches more than select_tokens: give kv_budget"


def once_a_prompt(name: str) -> Mapping[str, str]:
    """Refusals of a policy that needs tokens to be dropped, once a sequence."""
    return {
        "propagate": f"drops no tokens, which policy {name!r} needs; give propagate='gather'",
        "later_turns": f"does not go with policy {name!r}; give later_turns='keep'",
    }


class ASLTwoPass(Policy):
    """Finds layer and tokens as `ASL` does, then reads the selected tokens again from the first layer on, alone: the
    two-pass variant of arXiv 2601.07667.

    All layers then cache the selected tokens only, at their positions in the prompt. A prompt that does not settle by
    `max_layer` is selected from there.
    """

    name = "asl_two_pass"
    takes_profiles = True
    second_pass = True
    takes = Policy.takes - {"stages", "if_never", "propagate", "later_turns", "kv_top_p"}
    fixes: ClassVar[Mapping[str, Any]] = {"if_never": "select", "stages": ()}
    refusals: ClassVar[Mapping[str, str]] = {
        "stages": f"do not go with policy {name!r}, which reads the selected tokens again, once",
        "if_never": f"does not go with policy {name!r}, which selects in any case",
        "kv_top_p": NO_TOP_P,
        **once_a_prompt(name),
    }

    def check(self, config: ASLConfig, resolved: ASLConfig | None = None) -> None:
        """Stages that calibration found are passed over, as those of a profile are."""
        super().check(config if config.calibrated_for is None else config.replace(stages=None), resolved)
