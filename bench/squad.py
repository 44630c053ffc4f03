"""Questions in SQuAD's format about articles that are made up here: `python bench/squad.py FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from flexasl.tools.evaluation.recall import NAMES, PLACES, TOWNS, WARES

ARTICLES, SEED = 40, 7
TRADES = (
    "a clockmaker",
    "a surveyor",
    "a botanist",
    "a ship's cook",
    "a glazier",
    "a printer",
    "a beekeeper",
    "a tailor",
)
RIVERS = ("Ash", "Brine", "Colm", "Derrow", "Esk", "Fallow", "Gryfe", "Humber")


def articles(seed: int = SEED) -> dict[str, Any]:
    """Each of a town and a person of it: paragraphs of several facts each, and questions that say them in other
    words."""
    rng = Random(seed)
    return {"version": "1.1", "data": [_article(rng, place) for place in range(ARTICLES)]}


def write_questions(folder: Path) -> Path:
    """The file `questions.json` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "questions.json"
    write(file)
    return file


def write(file: Path) -> None:
    """The file of all articles."""
    file.write_text(json.dumps(articles(), indent=1) + "\n", encoding="utf-8")


def _article(rng: Random, place: int) -> dict[str, Any]:
    town = f"{rng.choice(('New', 'Upper', 'Lower', 'Great', 'Little'))} {TOWNS[place % len(TOWNS)]}"
    person = f"{NAMES[place % len(NAMES)]} {rng.choice(TOWNS)}"
    founded, bridge, fire = sorted(rng.sample(range(1420, 1890), 3))
    river, ware, other = rng.choice(RIVERS), *rng.sample(WARES, 2)
    people, height = rng.randrange(12, 99) * 100, rng.randrange(20, 95)
    trade, school, prize = rng.choice(TRADES), rng.choice(TOWNS), rng.randrange(30, 900)
    history = (
        f"{town} lies on the river {river}, some way above the marshes. Monks built the first houses there in "
        f"{founded}, and for two centuries the place lived from trade in {ware}. A stone bridge followed in "
        f"{bridge}. Most of the old centre was lost in {fire}, when a blaze went on for three days."
    )
    today = (
        f"Today {people} inhabitants are counted. The tallest building is the water tower, {height} metres high, "
        f"beside the {rng.choice(PLACES)}. Farms around {town} grow little but {other} for the markets of {school}."
    )
    life = (
        f"The best known native of {town} is {person}, {trade} by training. As a child {person.split()[0]} was sent to "
        f"relatives in {school} and came back only at the age of thirty. A society of learned people honoured the work "
        f"on tides with a prize of {prize} crowns."
    )
    asked = [
        (history, f"When was {town} founded?", str(founded)),
        (history, f"In which year did {town} get its bridge?", str(bridge)),
        (history, f"What goods made {town} rich in its first two centuries?", ware),
        (history, f"Which river flows through {town}?", river),
        (today, f"How many people live in {town}?", str(people)),
        (today, f"How tall is the water tower of {town}?", f"{height} metres"),
        (life, f"How much money did {person} receive as an award?", f"{prize} crowns"),
        (life, f"In which town did {person} grow up?", school),
    ]
    paragraphs = [
        {
            "context": text,
            "qas": [
                {
                    "id": f"{place}-{number}",
                    "question": question,
                    "answers": [{"text": answer, "answer_start": text.index(answer)}],
                }
                for number, (where, question, answer) in enumerate(asked)
                if where is text
            ],
        }
        for text in (history, today, life)
    ]
    return {"title": town, "paragraphs": paragraphs}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
