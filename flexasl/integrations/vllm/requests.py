"""The requests that a worker knows, and how many entries each layer's cache holds fewer than the request has tokens.

Shapes: S places for requests, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexasl.errors import FlexASLError
from flexasl.integrations.questions import Found, find
from flexasl.integrations.vllm.methods import Method, Methods, asked_for


@dataclasses.dataclass
class Request:
    """One request. Its prompt is what came with it, whatever it is read again with after a preemption."""

    name: str
    ids: list[int] | None
    """Of the prompt; None where it came as embeddings."""
    tokens: int
    """Of the prompt."""
    method: Method
    question: Any
    place: int
    """Its row in `Requests.dropped`."""
    computed: int = 0
    """Tokens before those of the current step."""

    def asked(self, tokenizer: Any) -> Found:
        """The question of the prompt, as a batch of one. Where the prompt does not have what was given as its question,
        the last tokens rank, and the report says so: a request cannot be refused any more."""
        if self.question is None and tokenizer is None:
            return Found()
        ids = None if self.ids is None else torch.tensor([self.ids], dtype=torch.int64, device="cpu")
        given = None if self.question is None else [self.question]
        try:
            return find(given, tokenizer, ids, [self.tokens], self.tokens)
        except FlexASLError as error:
            return Found([None], [str(error)])


class Requests:
    """Requests by name, in step with vLLM's scheduler."""

    def __init__(self, methods: Methods, most: int) -> None:
        """most: requests that run at once."""
        self._methods = methods
        self._known: dict[str, Request] = {}
        self._free = list(range(most))
        self.dropped = torch.zeros(most, methods.model.num_layers, dtype=torch.int32, device="cpu")
        """[S, L] on the host, where metadata are planned: entries by which a layer holds fewer than the request has
        tokens."""

    def update(self, scheduled: Any) -> None:
        """Takes in a `SchedulerOutput`, before the model runs on it."""
        for name in scheduled.finished_req_ids:
            gone = self._known.pop(name, None)
            if gone is not None:
                self._free.append(gone.place)
        for new in scheduled.scheduled_new_reqs:
            self._add(new)
        cached = scheduled.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens):
            self._known[name].computed = computed

    def named(self, names: Sequence[str]) -> list[Request]:
        """The requests of these names."""
        return [self._known[name] for name in names]

    def _add(self, new: Any) -> None:
        asked = asked_for(None if new.sampling_params is None else new.sampling_params.extra_args)
        if not self._free:  # requests that are preempted keep their places
            more = torch.zeros_like(self.dropped)
            self._free += range(len(self.dropped), 2 * len(self.dropped))
            self.dropped = torch.cat([self.dropped, more])
        question = asked.pop("question", None)
        known = self._known.get(new.req_id)
        place = self._free.pop() if known is None else known.place
        self.dropped[place] = 0
        self._known[new.req_id] = Request(
            new.req_id,
            new.prompt_token_ids,
            new.prompt_len,
            self._methods.of(asked),
            question,
            place,
            new.num_computed_tokens,
        )

    def lost(self, requests: Sequence[Request]) -> Tensor:
        """[B, L] int32 on the host: the `dropped` of these."""
        places = torch.tensor([request.place for request in requests], dtype=torch.int64, device="cpu")
        return self.dropped[places]
