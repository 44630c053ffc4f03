"""Log-likelihoods that lm-evaluation-harness would take from a pruned prompt, refused."""

from __future__ import annotations

import sys

from flexasl.config import ASLConfig
from flexasl.errors import UnsupportedError
from flexasl.policies import Policy

HARNESS, SCORES = "lm_eval", "_loglikelihood_tokens"


def refuse_likelihoods(policy: Policy, config: ASLConfig, tokens: int) -> None:
    """Raises `UnsupportedError` where lm_eval scores a continuation as the end of a prompt of so many tokens, which may
    be pruned: the continuation itself would then decide which tokens stay, and numbers would be plausible and wrong.

    Nothing in the call tells it from any other, so the callers are looked at, where lm_eval is loaded.
    """
    if HARNESS not in sys.modules or not policy.prunes_tokens or tokens <= config.token_budget(tokens):
        return
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == SCORES and module.partition(".")[0] == HARNESS:
            raise UnsupportedError(
                f"lm_eval asks for log-likelihoods inside a prompt of {tokens} tokens, of which a patched model drops "
                "some; give tasks that generate, policy='full', or a select_tokens that no prompt exceeds"
            )
        frame = frame.f_back  # type: ignore[assignment]
