"""What a calibration found, as data, text, picture and files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexasl import stored
from flexasl.config import LOOKUP_SCORES, ASLConfig
from flexasl.errors import FlexASLError
from flexasl.profiles import FORMAT, Profile
from flexasl.tools.calibration.checking import CHOSEN, DEFAULT, FULL, Answered, mean_cost, mean_score
from flexasl.tools.calibration.choosing import RULE, SETTINGS, Judged
from flexasl.tools.calibration.tables import Outcome
from flexasl.writing import beginning, check_file, replaced, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADING = "# Calibration of "


@dataclass(frozen=True)
class Used:
    """A prompt that was used."""

    task: str
    index: int
    tokens: int
    behind: str
    """The text after its question."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was tried on which prompts, what was chosen, and what the model answered by it to others."""

    config: ASLConfig
    """The settings to use, those that were chosen filled in, or the default's where these were kept."""
    about: dict[str, Any]
    """The model, how prompts were made, and versions."""
    prompts: tuple[Used, ...]
    """Those that settings were chosen on."""
    checked: tuple[Used, ...]
    """Those that were answered."""
    candidates: tuple[Judged, ...]
    chosen: Judged
    """One of the candidates."""
    default: Judged
    """What the library does if nothing is said."""
    fixed_layers: tuple[Judged, ...]
    """Selection at each layer, on its scores alone."""
    fixed_layer: Judged
    """The one of them that the same rule chooses."""
    answers: dict[str, tuple[Answered, ...]]
    """What was answered, with the `full` cache, by the `default` and by the `chosen` settings."""
    kept_default: bool
    """Whether the chosen settings lost answers in the check, so that the default's are used."""

    @property
    def verdict(self) -> str:
        """What the check says, in a sentence."""
        full, chosen, default = (f"{mean_score(self.answers[name]):.2f}" for name in (FULL, CHOSEN, DEFAULT))
        said = f"{chosen} of {len(self.checked)} other prompts by the chosen settings, {full} with the full cache"
        if self.kept_default:
            return f"Answered: {said}, and {default} by the default, which is therefore kept."
        return f"Answered: {said}, {default} by the default."

    def profile(self) -> Profile:
        """The settings as a profile, which `flexasl.patch` takes for this model."""
        assert self.config.calibrated_for is not None
        names = (*SETTINGS, *LOOKUP_SCORES)
        used = self.default if self.kept_default else self.chosen
        data = {
            "format": FORMAT,
            "model": dataclasses.asdict(self.config.calibrated_for),
            "settings": {name: value for name, value in self.config.to_dict().items() if name in names},
            "evidence": {
                "select_tokens": self.config.select_tokens,
                "length": self.about["length"],
                "seed": self.about["seed"],
                "prompts": dict(Counter(prompt.task for prompt in self.prompts)),
                "checked": dict(Counter(prompt.task for prompt in self.checked)),
                "held": round(used.held / len(self.prompts), 4),
                "cost": round(used.cost, 4),
                "waited": round(used.waited / len(self.prompts), 4),
                "answers": {name: round(mean_score(side), 4) for name, side in self.answers.items()},
                "costs": {name: round(mean_cost(side), 4) for name, side in self.answers.items()},
                "kept_default": self.kept_default,
                "versions": self.about["versions"],
            },
        }
        return Profile.from_dict(self.about["model"], stored.parse(stored.dump(_plain(data))))

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON's own types."""
        found: dict[str, Any] = _plain(
            {
                "config": self.config.to_dict(),
                "about": self.about,
                "rule": RULE,
                "verdict": self.verdict,
                "kept_default": self.kept_default,
                "prompts": [dataclasses.asdict(prompt) for prompt in self.prompts],
                "checked": [dataclasses.asdict(prompt) for prompt in self.checked],
                "chosen": self._data(self.chosen, whole=True),
                "default": self._data(self.default, whole=True),
                "fixed_layer": self._data(self.fixed_layer, whole=True),
                "fixed_layers": [self._data(one) for one in self.fixed_layers],
                "answers": {
                    name: [{"score": one.score, "text": one.text, **one.outcome._asdict()} for one in side]
                    for name, side in self.answers.items()
                },
                "candidates": [self._data(one) for one in self.candidates],
            }
        )
        return found

    def __str__(self) -> str:
        """A page in Markdown."""
        about, count = self.about, len(self.prompts)
        settings = [
            [f"`{name}`", _word(self.chosen.settings[name]), _word(self.default.settings[name])] for name in SETTINGS
        ]
        shown = {"chosen": self.chosen, "default": self.default}
        shown[f"{self.fixed_layer.name}, by the same rule"] = self.fixed_layer
        replayed = [
            [name, f"{one.held} of {count}", f"{one.cost:.2f}", f"{one.waited} of {count}" if one.rule else ""]
            for name, one in shown.items()
        ]
        best = max(one.held for one in self.candidates)
        answered = [
            [
                name,
                f"{mean_score(side):.2f}",
                f"{mean_cost(side):.2f}",
                *(["", ""] if name == FULL else _counts(side)),
            ]
            for name, side in self.answers.items()
        ]
        return "\n\n".join(
            [
                f"{HEADING}{about['model']}",
                self.verdict,
                _table(["setting", "chosen", "default"], settings),
                f"`select_tokens={self.config.select_tokens}`, prompts of at most {about['length']:,} tokens, half of "
                f"them with rules for the answer after the question; {len(self.candidates)} candidates, the best of "
                f"which hold {best} of {count} answers. {RULE}",
                "## On prompts that settings were chosen on, replayed",
                _table(["setting", "held", "cost", "`max_layer` decided"], replayed),
                "An answer is held where at least 90 % of the tokens of the sentence that states it are selected. "
                "Cost: operations of the prefill as a share of the full one's, mean over prompts.",
                "## On other prompts, answered",
                _table(["setting", "answered", "cost", "held", "`max_layer` decided"], answered),
                "## By task",
                _table(["task", "held", *(f"answered, {name}" for name in self.answers), "layers"], self._by_task()),
            ]
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Picture of shares held and answered against cost; written to `path` if given (PNG, SVG, PDF).

        Raises ImportError without matplotlib.
        """
        try:
            from flexasl.tools.calibration.picture import draw
        except ImportError as error:
            raise ImportError(
                "Calibration.plot needs matplotlib; install it with: pip install 'flexasl[plot]'"
            ) from error
        figure = draw(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def save(self, out: str | Path) -> list[Path]:
        """Writes the settings to `out`, which ends in .json, and beside it, under the same name, the evidence
        (`.evidence.json`, `.md`, `.png`) and the profile (`.profile.json`). Returns all paths. Raises FlexASLError for
        a name that ends otherwise, and where `check_files` does."""
        check_files("out", out)
        paths = files_of(out)
        with replaced(paths[3]) as new:
            self.plot(new)
        text = f"{self}\n\n![Shares held and answered against cost]({stored.nameable(paths[3].name)})\n"
        write(paths[2], text)
        write(paths[1], stored.dump(self.to_dict(), indent=1) + "\n")
        self.profile().save(paths[4])
        write(paths[0], stored.dump(self.config.to_dict(), indent=1) + "\n")
        return paths

    def _data(self, one: Judged, whole: bool = False) -> dict[str, Any]:
        data: dict[str, Any] = {"name": one.name, "settings": one.settings}
        data |= {"held": one.held, "cost": round(one.cost, 6), "waited": one.waited}
        return data | ({"outcomes": [outcome._asdict() for outcome in one.outcomes]} if whole else {})

    def _by_task(self) -> list[list[str]]:
        rows = []
        for task in dict.fromkeys(prompt.task for prompt in (*self.prompts, *self.checked)):
            own, others = (
                [at for at, one in enumerate(side) if one.task == task] for side in (self.prompts, self.checked)
            )
            made = [self.chosen.outcomes[at] for at in own]
            said = {name: [side[at] for at in others] for name, side in self.answers.items()}
            layers = sorted({_layers(one) for one in (*made, *(one.outcome for one in said[CHOSEN]))})
            held = f"{sum(one.held for one in made)} of {len(made)}" if made else ""
            scores = [f"{mean_score(side):.2f}" if side else "" for side in said.values()]
            rows.append([task, held, *scores, ", ".join(layers)])
        return rows


def files_of(out: str | Path) -> list[Path]:
    """The files that `Calibration.save` writes, the settings first. Raises FlexASLError where it could not."""
    out = Path(out)
    if out.suffix != ".json":
        raise FlexASLError(f"out={out} does not end in .json; give a name such as config.json")
    if out.is_dir():
        raise FlexASLError(f"out={out} is a folder; give a file in it, such as {out / 'config.json'}")
    if not out.parent.is_dir():
        raise FlexASLError(f"out={out} lies in a folder that does not exist; make {out.parent} first")
    return [out, *(out.with_suffix(end) for end in (".evidence.json", ".md", ".png", ".profile.json"))]


def check_files(name: str, out: str | Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raises FlexASLError where one of `files_of` cannot be written, is among the files that are read, or would replace
    a file that no calibration has written."""
    known = _holds("tau"), _holds("rule"), _is_page, _is_picture, _holds("evidence")
    for path, ours in zip(files_of(out), known, strict=True):
        check_file(name, path, inputs=inputs, ours=ours)


def _holds(field: str) -> Callable[[Path], bool]:
    def ours(path: Path) -> bool:
        try:
            found = stored.read(path)
        except stored.Unfit:
            return False
        return isinstance(found, dict) and field in found

    return ours


def _is_page(path: Path) -> bool:
    return beginning(path).startswith(HEADING.encode())


def _is_picture(path: Path) -> bool:
    return b"Matplotlib" in beginning(path)


def _counts(side: Sequence[Answered]) -> list[str]:
    counts = (sum(one.outcome.held for one in side), sum(one.outcome.waited for one in side))
    return [f"{count} of {len(side)}" for count in counts]


def _layers(made: Outcome) -> str:
    return "+".join(map(str, made.layers)) or "none"


def _plain(value: Any) -> Any:
    """The value with stages and tuples as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
