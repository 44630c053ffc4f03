"""Which tokens of a prompt ask, by its text alone: sentences with a question mark, or that open like a question or a
task, near the end of the user's last turn, or else near its beginning.

The rules, in order: the last turn is found by the chat template. Of its sentences, what says how to answer ("Answer in
one short sentence.") does not ask. The last sentence that asks is taken, with those that ask right before it, where at
most `NEAR` words of other text stand behind it. It may be a document's where it stands in the middle of a line, or has
no question mark and opens like a question, like two other lines of the turn ("Return …" in a reference) or like a task
that other text follows: then one at the beginning is taken, where it surely is no document's. A question that is there
at both ends counts at both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from flexasl.checks import shown
from flexasl.errors import FlexASLError
from flexasl.prompt_text import Prompt, Span, decoded, last_turn

NEAR = 80
"""Words of other text that may stand between the question and the end, or the beginning, of the turn."""
EDGE = 6000
"""Characters at either end of the turn in which a question is looked for."""

Kind = Literal["asks", "may ask", "label", "rule", "text"]
Form = Literal["marked", "task", "open"]

_QUOTES = "\"'“”‘’«»「」『』"
_CLOSING = r"[\"'”’»」』)\]*_]"
_BREAK = re.compile(
    # A line break, unless it is one inside of a sentence.
    rf"\n\s*\n\s*|(?<=[.!?:。！？：*_)\"'”])[ \t]*\n\s*|\n(?!\s*[a-z])\s*"
    rf"|(?<=[?!])\s+|(?<=[。！？])|(?<=[.!?…]{_CLOSING})\s+(?=[A-Z])|(?<=[.…])\s+(?=[{_QUOTES}(\[*_]*[A-Z0-9¿¡])"
)
_ABBREVIATED = re.compile(
    r"(?:^|[\s(])(?:\d{1,2}|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|No|Nos|Fig|Figs|Art|Sec|Eq|Vol|vs|cf|e\.g|i\.e|approx|[A-Z])\.$"
)
_ITEM = re.compile(r"\s*[#>*\-•–]\s")
_FIRST_WORD = re.compile(r"^[^\w\n]*([^\W\d_]+)", re.MULTILINE)
_MARKUP = re.compile(rf"^[\s>#*_\-•–{_QUOTES}(\[]*(?:(?:\d{{1,2}}|[a-hA-H])[.)]\s+)?[*_]*")
_LABEL = re.compile(
    r"^(?:the |my |user |your )?(?:questions?|query|q|task|request|problem|frage|aufgabe|pregunta|问题|問題|质问)"
    r"[*_]*\s*\d*[*_]*\s*(?:[:：)]|-(?=\s))[*_]*\s*",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"^(?:(?:now|then|next|finally|lastly|also|so|and|please|kindly|first|second|third|ok|okay|hi|hello|thanks)\b[,!]?\s+"
    r"|(?:based on|using|according to|from|given|with|in|after reading|for|by|considering)\b[^,.?\n]{0,90},\s+)+",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"^(?:(?:in|at|on|of|for|to|by|from|with|under|about)\s+)?(?:what|who|whom|whose|where|when|why|which|how)(?:'s|\b)"
    r"(?:\s+\S+){0,4}?\s*\b(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|shall|may|might|much|"
    r"many|long|often|old|far)\b|^(?:what|who|where|how)'s\b",
    re.IGNORECASE,
)
_TASK = re.compile(
    r"^(?:summari[sz]e|explain|describe|list|find|name|identify|tell|give|extract|compare|contrast|translate|count|"
    r"determine|calculate|compute|complete|continue|discuss|outline|classify|rewrite|paraphrase|quote|state|show|"
    r"retrieve|locate|report|select|choose|decide|evaluate|analy[sz]e|assess|review|infer|predict|provide|return|output|"
    r"print|recall|repeat|solve|fix|debug|draft|compose|generate|create|search|look up|point out|pick|rank|sort|"
    r"what about|how about|"
    r"write (?:me |us |down )?(?:a|an|the|some|down|two|three|\d+)\s+(?!sentence|word|plain|number)|"
    r"make (?:me |us )?(?:a|an|the) (?:list|table|summary|outline|overview)|"
    r"i(?:'d| would)? (?:want|need|like|wish|have a question)\b|i am (?:looking for|interested in)\b|"
    r"(?:can|could|would|will) you\b|let me know\b|help me\b)\b",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"(?://|#)\s*(?:[a-z]|\W*$)")
_CODE = re.compile(
    r"[{}=;\[\]\\]|\w\(|\w_\w|^[a-z]+(?: [\w.]+)?$|^[a-z]+ [(\"']|^[a-z]+[\"']\s*[:,)]|^return \w+,|\n[ \t]{4,}|"
    r"^return \w+(?:\.\w+)*\s*(?:\.\w|[-+*/%]|or |and |if )|^(?:continue|break|pass)\s+#"
)
"""In a sentence that begins with a small letter: a line of a program."""
_PATTERN = re.compile(r"\(\?[:P<=!#]|\\[wWsSdDbB]|[.)\]][*+]\?|[\"']\?[\"']$")
"""Of a regular expression or a character, which may end in a question mark."""
_FORMAT = re.compile(
    r"\b(?:only|alone|nothing else|no other|letter of|format(?:ted)?|json|markdown|bullet|comma|separated|digits|"
    r"(?:one|a single|two|three|\d+) (?:short )?(?:word|sentence|line|paragraph|phrase)s?|briefly|concise(?:ly)?|"
    r"without (?:any|further|other)|explanations?|your (?:answer|response|reply|reasoning)|"
    r"(?:the|an?|one) (?:final |short |direct |exact )?(?:answer|response|reply))\b",
    re.IGNORECASE,
)
_RULE = re.compile(
    r"^(?:answer|respond|reply|do not|don't|never|always|avoid|keep|use|write|be|limit|format|ensure|make sure|note|"
    r"cite|include|exclude|think step|stick|remember|say|mention|let's think|if (?:you|unsure|in doubt)|"
    r"if (?:the|there) .{0,30}\b(?:answer|information|text|context)|when (?:in doubt|unsure)|you (?:must|should|may)|"
    r"(?:start|begin|end) (?:your|the answer|with)|only|no (?:explanation|prose|other|extra|additional|need)s?|"
    r"your (?:final |short )?(?:answer|response|reply|output)|it must|"
    r"(?:the |an? )?(?:final )?(?:answer|response|reply|output|language|tone)s?\b.{0,40}\b(?:should|must|is|are|has|"
    r"have|needs?)|[\w ,'-]{0,40}:$)(?:\W|$)|^(?:[A-J]|\d{1,2})[.)]\s|^\W*$",
    re.IGNORECASE,
)


class _Sentence(NamedTuple):
    start: int
    stop: int
    """Its characters in the turn."""
    kind: Kind
    words: int
    """Those of it that are other text."""
    opens: bool
    """Whether it begins a line."""
    form: Form
    """Whether it has a question mark or a label, or opens like a task; open where it is a heading, or a list has it."""


def find_question(tokenizer: Any, ids: Sequence[int]) -> tuple[Span, ...]:
    """The tokens of a prompt that ask, ascending, by the rules above; none where nothing is found."""
    prompt = Prompt(tokenizer, ids)
    first, last = last_turn(tokenizer, prompt.text)
    return prompt.tokens((first + start, first + stop) for start, stop in asking(prompt.text[first:last]))


def question_tokens(tokenizer: Any, ids: Sequence[int], text: str) -> Span:
    """The tokens of a prompt that have a part in the last occurrence of a text; raises `FlexASLError` where the prompt
    does not contain it."""
    if not isinstance(text, str) or not text.strip():
        raise FlexASLError(f"question={shown(text)} has no text; give the question as it is written in the prompt")
    prompt, wanted = Prompt(tokenizer, ids), text.strip()
    start = prompt.text.rfind(wanted)
    if start < 0:
        raise FlexASLError(f"question={shown(text)} is not in the prompt; give it as it stands there, or as positions")
    return prompt.tokens([(start, start + len(wanted))])[0]


def text_of(tokenizer: Any, ids: Sequence[int], spans: Iterable[Span]) -> str:
    """What these tokens say."""
    return " … ".join(" ".join(decoded(tokenizer, ids[start:stop]).split()) for start, stop in spans)


def asking(turn: str) -> list[tuple[int, int]]:
    """The characters of a user's message that ask, ascending, as (start, stop)."""
    tail = max(0, len(turn) - EDGE)
    early, late = _sentences(turn[:EDGE]), _sentences(turn[tail:])
    late = [one._replace(start=one.start + tail, stop=one.stop + tail) for one in late]
    kinds: tuple[Kind, ...] = ("asks", "may ask")
    for kind in kinds:
        before, (found, behind) = _early(early, kind), _late(late, kind)
        usual = _usual(turn, [*before, *found])
        before, found = ([one for one in group if one not in usual] or group for group in (before, found))
        inline = found and behind and not found[0].opens
        if not found or (before and inline) or (_sure(before, usual) and not _sure(found, usual, behind)):
            found = before
        elif before and before[-1].stop < found[0].start:
            one, other = _plain(turn, before), _plain(turn, found)
            found = before + found if one in other or other in one else found
        if found:
            return [(one.start, one.stop) for one in found]
    return []


def _usual(turn: str, sentences: list[_Sentence]) -> list[_Sentence]:
    """Tasks that open like two other lines of the turn, as in a reference whose entries begin with "Return"."""
    words = Counter(word.lower() for word in _FIRST_WORD.findall(turn))
    found = [(one, _FIRST_WORD.match(turn[one.start : one.stop])) for one in sentences if one.form == "task"]
    opening = [(one, word[1].lower()) for one, word in found if word]
    own = Counter(word for _, word in opening)
    return [one for one, word in opening if words[word] - own[word] >= 2]


def _sure(sentences: list[_Sentence], usual: list[_Sentence], behind: int = 0) -> bool:
    """Whether some of them are surely no part of a document. behind: words of other text behind them."""
    return any(one.form == "marked" or (one.form == "task" and not behind and one not in usual) for one in sentences)


def _late(sentences: list[_Sentence], kind: Kind) -> tuple[list[_Sentence], int]:
    """The sentences near the end of this kind, and how many words of other text stand behind them."""
    words = 0
    for place in range(len(sentences) - 1, -1, -1):
        one = sentences[place]
        if one.kind == kind:
            return _with_those_before(sentences, place), words
        words += one.words
        if words > NEAR:
            break
    return [], 0


def _with_those_before(sentences: list[_Sentence], place: int) -> list[_Sentence]:
    """A sentence that asks, after those that ask right before it. One in the middle of a line that ends there may be a
    document's."""
    found = [sentences[place]]
    for one in reversed(sentences[:place]):
        if one.kind == "text" or (one.kind == "asks" and found[0].opens and not one.opens):
            break
        if one.kind == found[0].kind:
            found.insert(0, one)
    return found


def _early(sentences: list[_Sentence], kind: Kind) -> list[_Sentence]:
    """The sentences near the beginning of this kind."""
    words, found = 0, []
    for one in sentences:
        if one.kind == kind:
            found.append(one)
        elif found and one.kind != "rule":
            break
        words += one.words
        if words > NEAR:
            break
    return found


def _sentences(text: str) -> list[_Sentence]:
    ends = [found.span() for found in _BREAK.finditer(text)]
    ends = [(a, b) for a, b in ends if "\n" in text[a:b] or not _ABBREVIATED.search(text[max(0, a - 12) : a])]
    made: list[_Sentence] = []
    start, opens, labelled = 0, True, False
    for stop, after in [*ends, (len(text), len(text))]:
        words = text[start:stop].strip()
        if words:
            first = start + text[start:stop].index(words[0])
            kind, form = _kind(words)
            if labelled and kind in ("text", "may ask"):
                kind, form = "asks", "marked"
            labelled = kind == "label"
            count = len(words.split()) if kind == "text" else 0
            made.append(_Sentence(first, first + len(words), kind, count, opens, form))
            opens = False
        opens = opens or "\n" in text[stop:after]
        start = after
    return made


def _kind(sentence: str) -> tuple[Kind, Form]:
    markup = _MARKUP.match(sentence)[0]  # type: ignore[index]
    bare = sentence[len(markup) :]
    label = _LABEL.match(bare) or _LABEL.fullmatch(f"{bare.rstrip('*_ ')}:")
    if label is not None:
        return "asks" if bare[label.end() :].strip(" *_") else "label", "marked"
    quoted = sentence[0] in _QUOTES and sentence[-1] in _QUOTES
    if _COMMENT.match(sentence):
        return "text", "open"
    if not quoted and re.search(rf"[?？؟]{_CLOSING}*$", sentence):
        if _PATTERN.search(sentence) and not _QUESTION.match(bare):
            return "text", "open"
        return "asks", "open" if sentence.startswith("#") else "marked"
    if quoted or sentence.startswith(('"""', "'''")) or (bare[:1].islower() and _CODE.search(sentence)):
        return "text", "open"
    while (opening := _OPENING.match(bare)) is not None:
        bare = bare[opening.end() :]
    if _TASK.match(bare):
        return "may ask" if _FORMAT.search(bare) else "asks", "open" if _ITEM.match(markup) else "task"
    if _RULE.match(bare) or _RULE.match(sentence):
        return "rule", "open"
    return "asks" if _QUESTION.match(bare) else "text", "open"


def _plain(turn: str, sentences: list[_Sentence]) -> str:
    """What sentences say, for comparing: letters and digits alone."""
    said = " ".join(turn[one.start + len(_opening(turn[one.start : one.stop])) : one.stop] for one in sentences)
    return re.sub(r"\W+", " ", said).strip().lower()


def _opening(sentence: str) -> str:
    """Its markup and label."""
    rest = sentence[_MARKUP.match(sentence).end() :]  # type: ignore[union-attr]
    return sentence[: len(sentence) - len(_LABEL.sub("", rest))]
