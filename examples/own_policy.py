"""A policy of one's own: `python examples/own_policy.py`.

This one drops half of the tokens after a quarter of the layers, and all but `select_tokens` after half of them.
docs/own-policy.md says what else a policy may decide.
"""

import flexasl
from flexasl import embedded, policies
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids


class Halving(policies.Policy):
    name = "halving"
    takes = policies.CACHE | policies.SCORES | {"select_tokens"}  # other settings are refused where they are given
    fixes = {"select_on": "last", "observe_layers": 1, "if_never": "select"}  # noqa: RUF012

    def selector(self, config, prompts):
        def plan(prompt_tokens: int) -> dict[int, int]:
            """How many tokens are kept, by layer."""
            budget = config.token_budget(prompt_tokens)
            return {prompts.num_layers // 4: max(prompt_tokens // 2, budget), prompts.num_layers // 2: budget}

        return policies.ScheduledSelector(plan, config, prompts)


def main() -> None:
    model, tokenizer = embedded.load()
    fact = magic_number(1)
    message = needle_prompt(tokenizer, 1200, 0.4, fact.needle, fact.question)
    ids = prompt_ids(tokenizer, message, fact.answer_prefix)
    config = flexasl.ASLConfig(select_tokens=256)
    for policy in ("asl", Halving()):
        said = flexasl.run.answer(
            model, tokenizer, ids, max_new_tokens=8, config=config, policy=policy, question=fact.question
        )
        print(f"{said.text} ({fact.answer} is right)\n{said.report}\n")


if __name__ == "__main__":
    main()
