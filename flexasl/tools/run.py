"""One answer from one model, measured: make the prompt, generate with or without pruning, at once or later."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import flexasl
from flexasl.errors import FlexASLError
from flexasl.integrations.transformers.fingerprint import fingerprint
from flexasl.integrations.transformers.models import decoder_layers
from flexasl.question import question_tokens
from flexasl.report import Report
from flexasl.tools.loading import GREEDY
from flexasl.tools.loading import load_model as load_model
from flexasl.tools.text import bare_ids, encode, prompt_ids, render

WARM_UP_TOKENS = 768
BEFORE, AFTER = "before question", "after question"
"""Names of notes in a saved prompt: the text on both sides of the question, which is read with it."""
PROBES = ("What?", "12", "“It”")
"""Beginnings of questions, to find out where a tokenizer can cut a prompt."""


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said, and what it cost."""

    text: str
    """The answer, without special tokens."""
    prompt_tokens: int
    """Tokens of the prompt."""
    new_tokens: int
    """Tokens of the answer."""
    first_token_seconds: float
    """Wall time from the call of `generate` until its first token is there: the prefill and one choice of a token."""
    total_seconds: float
    """Wall time of the whole call of `generate`."""
    kv_bytes: int
    """Keys and values of the prompt, over all layers, in bytes."""
    report: Report | None = None
    """What was pruned; None without a patch."""

    def to_dict(self) -> dict[str, Any]:
        """The answer in JSON's own types; the report only where there is one."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "report"}
        return data if self.report is None else data | {"report": self.report.to_dict()}


def question_ids(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> list[int]:
    """Token ids of a text and a question about it, through the chat template where the tokenizer has one.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        question: The question, which comes after the text.
    """
    return prompt_ids(tokenizer, _asking(tokenizer, text, question))


def opening_ids(tokenizer: Any, text: str, about: str = "") -> tuple[list[int], dict[str, str]]:
    """Token ids of a prompt up to its question, which is not known yet, and the notes that `closing_ids` needs.

    The prompt ends with the question as that of `question_ids` does, token for token where the tokenizer has a word
    end between them.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        about: What will be asked, in any words; it is put between the text and the question.
    """
    mark = "[question]"
    while mark in text + about:
        mark = f"[{mark}]"
    body = f"{text}\n\n{about}" if about else text
    whole = render(tokenizer, _asking(tokenizer, body, mark))
    start, _, after = whole.partition(mark)
    if whole.count(mark) != 1:
        raise FlexASLError("the chat template changes the user's message, so that a question cannot be put in later")
    # Most tokenizers take spaces and line ends with the word after them, some with the mark before them.
    bare = start.rstrip()
    for head, between in ((bare, start[len(bare) :]), (start, "")):
        ids, notes = encode(tokenizer, head), {BEFORE: between, AFTER: after}
        if all(ids + closing_ids(tokenizer, notes, x) == encode(tokenizer, start + x + after) for x in PROBES):
            break
    return ids, notes


def closing_ids(tokenizer: Any, notes: Mapping[str, str], question: str, answer_prefix: str = "") -> list[int]:
    """Token ids of the question, all that comes after it and the start of the answer, to go behind `opening_ids`."""
    return bare_ids(tokenizer, notes[BEFORE] + question + notes[AFTER] + answer_prefix)


def check_fits(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise FlexASLError, which names both lengths, where prompt and answer are longer than the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_tokens + max_new_tokens > context:
        raise FlexASLError(
            f"the prompt has {prompt_tokens} tokens, which with max_new_tokens={max_new_tokens} is longer than "
            f"the model's context of {context} tokens"
        )


def check_tokens(model: PreTrainedModel, highest: int) -> None:
    """Raise FlexASLError for a token id, the highest one of some prompts, that the model does not have."""
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    if highest >= known:
        raise FlexASLError(f"tokenizer makes token {highest}, and the model has {known}; give the model's tokenizer")


def warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], **patching: Any) -> None:
    """Run the start of the prompt both ways, so that neither of two timed runs pays for being first."""
    start = ids[:WARM_UP_TOKENS]
    answer(model, tokenizer, start, max_new_tokens=2, **patching)
    answer(model, tokenizer, start, max_new_tokens=2)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    *,
    max_new_tokens: int,
    config: flexasl.ASLConfig | None = None,
    policy: str | flexasl.policies.Policy | None = None,
    question: str | None = None,
    find_question: bool = False,
    profile: Literal[False] | None = None,
    on_text: Callable[[str], None] = _nothing,
    on_layer: Callable[[], None] = _nothing,
) -> Answer:
    """Greedy answer to a prompt, pruned by a policy, or not pruned.

    Args:
        model: A transformers model in eval mode.
        tokenizer: Its tokenizer.
        ids: Token ids of the prompt, as `question_ids` makes them.
        max_new_tokens: Longest answer, in tokens.
        config: The settings. None: `ASLConfig()`.
        policy: A policy's name, alone or with settings, or an instance. None: nothing is pruned.
        question: The text of the prompt whose queries rank the others.
        find_question: Whether a question is looked for in the prompt where none is given. Where there is none, the
            last tokens rank.
        profile: As for `flexasl.patch`.
        on_text: Called with each piece of the answer.
        on_layer: Called after each decoder layer of the prefill.

    Returns:
        The answer, with times, bytes and the report.
    """
    if policy is None:
        return _generate(model, tokenizer, ids, max_new_tokens, on_text, on_layer)
    asking = {"tokenizer": tokenizer} if find_question and question is None else _ranking(tokenizer, ids, question)
    with flexasl.patch(model, config, policy=policy, profile=profile, **asking) as patch:
        plain = _generate(model, tokenizer, ids, max_new_tokens, on_text, on_layer)
        report = patch.report
    assert report is not None  # a prefill has just run
    return dataclasses.replace(plain, report=report, kv_bytes=report.kv_bytes)


def check_savable(model: PreTrainedModel) -> None:
    """Raise FlexASLError where the model's caches cannot be saved."""
    fingerprint(model)


def prefill(
    model: PreTrainedModel,
    ids: list[int],
    *,
    config: flexasl.ASLConfig | None = None,
    policy: str | flexasl.policies.Policy = "asl",
    tokenizer: Any = None,
    question: str | None = None,
    on_layer: Callable[[], None] = _nothing,
) -> Any:
    """Reads a prompt, pruned by the policy, and returns its cache, to be saved.

    Args:
        model: A transformers model in eval mode.
        ids: Token ids of the prompt, as `opening_ids` makes them.
        config: The settings. None: `ASLConfig()`.
        policy: A policy's name, alone or with settings, or an instance.
        tokenizer: The model's tokenizer, which finds `question` in the prompt.
        question: The text of the prompt whose queries rank the others. None: the last tokens rank.
        on_layer: Called after each decoder layer.

    Returns:
        The cache. Its last report says what was pruned.
    """
    asking = _ranking(tokenizer, ids, question)
    prompt = torch.tensor([ids], dtype=torch.int64, device=model.device)
    patching = flexasl.patch(model, config, policy=policy, **asking)
    with patching, _layers_watched(model, lambda: False, on_layer), torch.no_grad():
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values


def answer_saved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    question: str,
    *,
    max_new_tokens: int,
    answer_prefix: str = "",
    on_text: Callable[[str], None] = _nothing,
    on_layer: Callable[[], None] = _nothing,
) -> Answer:
    """Greedy answer to a question about a prompt that was read before, from the file of its cache.

    Times are of the question alone; the report is that of the prefill.

    Args:
        model: The model that read the prompt.
        tokenizer: Its tokenizer.
        path: The file, as `flexasl prefill` writes it.
        question: The question.
        max_new_tokens: Longest answer, in tokens.
        answer_prefix: Start of the answer, which the model continues.
        on_text: Called with each piece of the answer.
        on_layer: Called after each decoder layer, while the question is read.

    Raises:
        FlexASLError: The file is not one that `flexasl prefill` wrote with this model.
    """
    # The question itself is not pruned, under any policy.
    with flexasl.patch(model, policy="full"):
        cache = flexasl.load_cache(path, model)
        read = cache.token_ids
        if read is None or len(read) != 1 or not {BEFORE, AFTER} <= set(cache.notes):
            raise FlexASLError(f"{path} does not say where its question belongs; give one that flexasl prefill wrote")
        kv_bytes = sum(layer.nbytes for layer in cache.layers)
        ids = read[0].tolist() + closing_ids(tokenizer, cache.notes, question, answer_prefix)
        check_fits(model, len(ids), max_new_tokens)
        said = _generate(model, tokenizer, ids, max_new_tokens, on_text, on_layer, cache)
    report = cache.reports[-1] if cache.reports else None
    return dataclasses.replace(said, report=report, kv_bytes=kv_bytes)


def _ranking(tokenizer: Any, ids: list[int], question: str | None) -> dict[str, Any]:
    """What `patch` is given so that the question ranks; nothing where the prompt does not have it."""
    if question is not None:
        with contextlib.suppress(FlexASLError):
            question_tokens(tokenizer, ids, question)
            return {"tokenizer": tokenizer, "question": question}
    return {}


def _asking(tokenizer: Any, text: str, question: str) -> str:
    """The message of a text and a question; without a chat template it says itself where the answer begins."""
    if tokenizer.chat_template is None:
        return f"{text}\n\nQuestion: {question}\nAnswer:"
    return f"{text}\n\n{question}"


def _generate(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    on_text: Callable[[str], None],
    on_layer: Callable[[], None],
    cache: Any = None,
) -> Answer:
    prompt = torch.tensor([ids], dtype=torch.int64, device=model.device)
    stream = _Stream(tokenizer, on_text)
    with _layers_watched(model, lambda: stream.first_token_at > 0, on_layer):
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **({} if cache is None else {"past_key_values": cache}),  # newer versions warn of the name
            max_new_tokens=max_new_tokens,
            streamer=stream,
            tokenizer=tokenizer,  # for stop strings
            **GREEDY,
            return_dict_in_generate=True,
        )
        end = time.perf_counter()
    new = out.sequences[0, len(ids) :]
    return Answer(
        text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        prompt_tokens=len(ids),
        new_tokens=len(new),
        first_token_seconds=stream.first_token_at - start,
        total_seconds=end - start,
        kv_bytes=_kv_bytes(out.past_key_values, len(ids)),
    )


class _Stream(TextStreamer):
    """Passes finished text on, and notes when the first token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_token_at = 0.0
        self._on_text = on_text

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and not self.first_token_at:
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


@contextlib.contextmanager
def _layers_watched(
    model: PreTrainedModel, is_over: Callable[[], bool], on_layer: Callable[[], None]
) -> Iterator[None]:
    def tell(*_: Any) -> None:
        if not is_over():
            on_layer()

    layers = [] if on_layer is _nothing else decoder_layers(model)
    handles = [layer.register_forward_hook(tell) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kv_bytes(cache: Any, prompt_tokens: int) -> int:
    """Bytes of the prompt's part of an ordinary cache."""
    layers = [layer for layer in getattr(cache, "layers", []) if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    return sum(part[..., :prompt_tokens, :].nbytes for layer in layers for part in (layer.keys, layer.values))
