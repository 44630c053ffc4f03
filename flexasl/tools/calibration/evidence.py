"""What a calibration found, as data, text, picture and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexasl import stored
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.tools.calibration.choosing import RULE, SETTINGS, Judged
from flexasl.writing import beginning, check_file, replaced, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADING = "# Calibration of "
BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#666666", "#2f855a"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was tried on which prompts, and what was chosen."""

    config: ASLConfig
    """The settings to use, those that were chosen filled in."""
    about: dict[str, Any]
    """The model, and how prompts were made."""
    prompts: tuple[tuple[str, int, int], ...]
    """Task, index and tokens of each."""
    choosing: tuple[int, ...]
    """The prompts that settings were chosen on, as places in `prompts`."""
    candidates: tuple[Judged, ...]
    chosen: Judged
    """One of the candidates."""
    default: Judged
    """What the library does if nothing is said."""
    fixed_layers: tuple[Judged, ...]
    """Selection at each layer, on its scores alone."""
    fixed_layer: Judged
    """The one of them that the same rule chooses."""

    @property
    def checking(self) -> tuple[int, ...]:
        """The prompts that the choice did not see."""
        return tuple(at for at in range(len(self.prompts)) if at not in self.choosing)

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON's own types."""
        return {
            "config": self.config.to_dict(),
            "about": self.about,
            "rule": RULE,
            "prompts": [
                {"task": task, "index": index, "tokens": tokens, "used_for": self._use(at)}
                for at, (task, index, tokens) in enumerate(self.prompts)
            ],
            "chosen": self._data(self.chosen, whole=True),
            "default": self._data(self.default, whole=True),
            "fixed_layer": self._data(self.fixed_layer, whole=True),
            "fixed_layers": [self._data(one) for one in self.fixed_layers],
            "candidates": [self._data(one) for one in self.candidates],
        }

    def __str__(self) -> str:
        """A page in Markdown."""
        shown = {"**chosen**": self.chosen, "default": self.default}
        shown[f"{self.fixed_layer.name}, by the same rule"] = self.fixed_layer
        sides = (self.choosing, self.checking)
        most = max(one.kept(self.choosing) for one in self.candidates)
        settings = [
            [f"`{name}`", _word(self.chosen.settings[name]), _word(self.default.settings[name])] for name in SETTINGS
        ]
        results = [
            [name, *(cell for side in sides for cell in (_of(one.kept(side), side), f"{one.cost(side):.2f}"))]
            for name, one in shown.items()
        ]
        about = self.about
        return "\n\n".join(
            [
                f"{HEADING}{about['model']}",
                _table(["setting", "chosen", "default"], settings),
                f"`select_tokens={self.config.select_tokens}`, prompts of at most {about['length']:,} tokens, "
                f"{len(self.candidates)} candidates, the best of which keep {_of(most, self.choosing)} answers. {RULE}",
                "## On prompts that it was chosen on, and on others",
                _table(["setting", "stays, chosen on", "cost", "stays, held out", "cost"], results),
                "An answer stays where the selection holds at least 90 % of the tokens that state it. Cost: operations "
                "of the prefill as a share of the full one's, mean over prompts.",
                "## By task, chosen settings",
                _table(["task", "stays, chosen on", "stays, held out", "cost", "layers"], self._by_task()),
            ]
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Picture of share kept against cost, a point for each candidate; written to `path` if given (PNG, SVG, PDF).

        Raises ImportError without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Calibration.plot needs matplotlib; install it with: pip install 'flexasl[plot]'"
            ) from error
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        self._draw(left, self.choosing, f"{len(self.choosing)} prompts that the choice was made on")
        self._draw(right, self.checking, f"{len(self.checking)} held-out prompts")
        left.set_ylabel("share of prompts whose answer stays")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
        figure.suptitle(f"{self.about['model']}, select_tokens={self.config.select_tokens}", fontsize=11)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def save(self, out: str | Path) -> list[Path]:
        """Writes the settings to `out`, which ends in .json, and beside it, under the same name, the evidence:
        `.evidence.json`, `.md` and `.png`. Returns all paths. Raises FlexASLError for a name that ends
        otherwise, and where `check_files` does."""
        check_files("out", out)
        paths = files_of(out)
        with replaced(paths[3]) as new:
            self.plot(new)
        text = f"{self}\n\n![Share kept against cost]({stored.nameable(paths[3].name)})\n"
        write(paths[2], text)
        write(paths[1], stored.dump(self.to_dict(), indent=1) + "\n")
        write(paths[0], stored.dump(self.config.to_dict(), indent=1) + "\n")
        return paths

    def _use(self, at: int) -> str:
        return "choice" if at in self.choosing else "check"

    def _data(self, one: Judged, whole: bool = False) -> dict[str, Any]:
        data: dict[str, Any] = {"name": one.name, "settings": _settings(one)}
        for use, side in (("choice", self.choosing), ("check", self.checking)):
            data[use] = {"prompts": len(side), "kept": one.kept(side), "cost": round(one.cost(side), 6)}
        return data | ({"outcomes": [outcome._asdict() for outcome in one.outcomes]} if whole else {})

    def _by_task(self) -> list[list[str]]:
        rows = []
        for task in dict.fromkeys(task for task, _, _ in self.prompts):
            own = [at for at, prompt in enumerate(self.prompts) if prompt[0] == task]
            sides = [[at for at in own if (at in self.choosing) == seen] for seen in (True, False)]
            layers = sorted({self.chosen.outcomes[at].layer for at in own}, key=lambda layer: (layer is None, layer))
            kept = [_of(self.chosen.kept(side), side) if side else "" for side in sides]
            rows.append([task, *kept, f"{self.chosen.cost(own):.2f}", ", ".join(map(_word, layers))])
        return rows

    def _draw(self, axes: Axes, side: Sequence[int], title: str) -> None:
        def point(one: Judged) -> tuple[float, float]:
            return one.cost(side), one.kept(side) / len(side)

        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("cost: operations of the prefill / full prefill")
        line = [point(one) for one in self.fixed_layers]
        axes.plot(*zip(*line), color=GREY, linewidth=1, marker=".", markersize=3, label="fixed layers", zorder=1)
        costs, shares = zip(*map(point, self.candidates))
        axes.scatter(costs, shares, s=22, color=BLUE, alpha=0.25, linewidths=0, label="candidates", zorder=2)
        marked = (("default", self.default, "s", GREEN), ("chosen", self.chosen, "*", ORANGE))
        for label, one, marker, color in marked:
            size = 190 if label == "chosen" else 60
            cost, share = point(one)
            axes.scatter(cost, share, s=size, marker=marker, color=color, edgecolors="white", label=label, zorder=3)
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlim(right=1.02)
        axes.grid(alpha=0.3)


def files_of(out: str | Path) -> list[Path]:
    """The files that `Calibration.save` writes, the settings first. Raises FlexASLError where it could not."""
    out = Path(out)
    if out.suffix != ".json":
        raise FlexASLError(f"out={out} does not end in .json; give a name such as config.json")
    if out.is_dir():
        raise FlexASLError(f"out={out} is a folder; give a file in it, such as {out / 'config.json'}")
    if not out.parent.is_dir():
        raise FlexASLError(f"out={out} lies in a folder that does not exist; make {out.parent} first")
    return [out, out.with_suffix(".evidence.json"), out.with_suffix(".md"), out.with_suffix(".png")]


def check_files(name: str, out: str | Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raises FlexASLError where one of `files_of` cannot be written, is among the files that are read, or would replace
    a file that no calibration has written."""
    for path, ours in zip(files_of(out), (_holds("tau"), _holds("rule"), _is_page, _is_picture), strict=True):
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


def _of(count: int, side: Sequence[int]) -> str:
    return f"{count} of {len(side)}"


def _settings(one: Judged) -> dict[str, Any]:
    """The settings in JSON's own types."""
    stages = [dataclasses.asdict(stage) for stage in one.settings.get("stages", ())]
    return one.settings | ({"stages": stages} if one.settings else {})


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
