"""Questions that do not point at their answer by its words: about one sentence of prose that says it in other words,
and about one sentence of a text whose sentences are all of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from flexasl.tools.evaluation.haystack import hide, join
from flexasl.tools.evaluation.samples import Draft, Recipe
from flexasl.tools.evaluation.sources import Sources
from flexasl.tools.evaluation.words import distinct

DISTRACTORS = 3
"""Other people that prose tells of."""
NAMES = [
    "Adele",
    "Adrian",
    "Agnes",
    "Albin",
    "Amelia",
    "Anton",
    "Beatrix",
    "Boris",
    "Bruno",
    "Carla",
    "Casper",
    "Celia",
    "Clara",
    "Conrad",
    "Dagmar",
    "Damian",
    "Edith",
    "Edgar",
    "Elias",
    "Elsa",
    "Felix",
    "Fiona",
    "Flora",
    "Frida",
    "Gerard",
    "Greta",
    "Harald",
    "Hector",
    "Helga",
    "Hugo",
    "Ingrid",
    "Irene",
    "Ivan",
    "Jasper",
    "Judith",
    "Julius",
    "Klara",
    "Lambert",
    "Laura",
    "Leon",
    "Linus",
    "Lydia",
    "Magda",
    "Marcus",
    "Marta",
    "Milo",
    "Mona",
    "Nadia",
    "Nils",
    "Olga",
    "Oscar",
    "Otto",
    "Paula",
    "Philip",
    "Rosa",
    "Rudolf",
    "Sofia",
    "Stefan",
    "Tessa",
    "Thea",
    "Theo",
    "Ulrich",
    "Ursula",
    "Vera",
    "Victor",
    "Viola",
    "Walter",
    "Wanda",
    "Yvonne",
    "Zara",
]
TOWNS = [
    "Aldwick",
    "Barnham",
    "Calder",
    "Denholm",
    "Elmford",
    "Fairlight",
    "Garstang",
    "Hexley",
    "Ilkmoor",
    "Kelby",
    "Langport",
    "Marlow",
    "Norwick",
    "Oakham",
    "Penrith",
    "Quorn",
    "Redmire",
    "Selby",
    "Thornby",
    "Upton",
    "Wexcombe",
    "Yarrow",
]
PLACES = [
    "north gate",
    "south gate",
    "old mill",
    "town hall",
    "new bridge",
    "market square",
    "post office",
    "fire station",
]
WARES = [
    "apples",
    "barley",
    "candles",
    "copper",
    "flour",
    "glass",
    "honey",
    "linen",
    "nails",
    "oats",
    "paper",
    "rope",
    "salt",
    "soap",
    "tiles",
    "wool",
]


class Paraphrase(NamedTuple):
    """A sentence, and a question about it that shares none of its words but the little ones."""

    statement: str
    """With a place for the one who is asked for."""
    question: str


PARAPHRASES = (
    Paraphrase("{} plays the violin in the evenings.", "Who is a musician?"),
    Paraphrase("{} keeps three cats and a parrot at home.", "Who has pets?"),
    Paraphrase("{} broke an ankle on the stairs last week.", "Who had an accident and was injured?"),
    Paraphrase("{} bakes bread at four every morning.", "Whose job is it to prepare food?"),
    Paraphrase("{} swims two miles in the lake each day.", "Who does a sport in water?"),
    Paraphrase("{} speaks Italian, Dutch and Polish.", "Who knows several foreign languages?"),
    Paraphrase("{} grows roses and tulips behind the house.", "Who likes gardening and flowers?"),
    Paraphrase("{} repairs engines at the garage.", "Who works as a car mechanic?"),
    Paraphrase("{} teaches sums and spelling to small children.", "Who is employed at a primary school?"),
    Paraphrase("{} was fined for driving too fast.", "Who got a penalty from the police?"),
    Paraphrase("{} looks at Saturn through a telescope at night.", "Who is interested in astronomy and planets?"),
    Paraphrase("{} won a prize for the best short story.", "Which person is a gifted writer?"),
    Paraphrase("{} sails a small yacht along the coast.", "Who owns a boat?"),
    Paraphrase("{} sneezes whenever there is pollen about.", "Who suffers from an allergy?"),
    Paraphrase("{} left for Brazil and will stay there until spring.", "Who is abroad, in South America?"),
    Paraphrase("{} cuts hair in the shop on the corner.", "Who is the barber?"),
    Paraphrase("{} paints portraits in oil.", "Who is an artist?"),
    Paraphrase("{} treats sick cows and horses.", "Who is a veterinarian, a doctor for animals?"),
    Paraphrase("{} put out the blaze at the barn.", "Who fought a fire?"),
    Paraphrase("{} never eats meat or fish.", "Who is a vegetarian?"),
    Paraphrase("{} lost all savings at the casino.", "Who gambled and has no money left?"),
    Paraphrase("{} wears thick glasses to read.", "Who has poor eyesight?"),
    Paraphrase("{} married in June, in a white dress.", "Who was a bride at a wedding?"),
    Paraphrase("{} climbed the Matterhorn twice.", "Who is a mountaineer?"),
)


def by_meaning(rng: Random, sources: Sources, number: int) -> Recipe:
    """Who does something, where the text says it in other words; some other people do other things."""
    wanted = PARAPHRASES[number % len(PARAPHRASES)]
    others = rng.sample([one for one in PARAPHRASES if one is not wanted], DISTRACTORS)
    names = rng.sample(NAMES, 1 + DISTRACTORS)
    told = [one.statement.format(name) for one, name in zip((wanted, *others), names, strict=True)]
    depths = [rng.random() for _ in told]
    hay = sources.prose.read_from(rng).first
    intro = "Read the text below. Some people are mentioned in it."
    question = f"{wanted.question} Give the name of the person."

    def draft(units: int) -> Draft:
        return Draft(f"{intro}\n\n{hide(told, depths, hay(units))}\n\n{question}", "The name is", (names[0],))

    return Recipe(draft)


class Register(NamedTuple):
    """Sentences of one kind, each about another key, and a question about one."""

    intro: str
    sentence: str
    """With places for a key, a number and a second fact."""
    question: str
    """With a place for the key."""
    prefix: str
    key: Callable[[Random], str]
    second: Callable[[Random], str]


def _full_name(rng: Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(TOWNS)}"


def _ship(rng: Random) -> str:
    return f"the {rng.choice(NAMES)} of {rng.choice(TOWNS)}"


REGISTERS = (
    Register(
        "The following is a list of what people bought at a market.",
        "{0} paid {1} crowns for a load of {2}.",
        "How many crowns did {0} pay?",
        "{0} paid",
        _full_name,
        lambda rng: rng.choice(WARES),
    ),
    Register(
        "The following is a log of letters that were delivered.",
        "Letter {1} was handed to {0} near the {2}.",
        "What is the number of the letter that was handed to {0}?",
        "The number of the letter is",
        _full_name,
        lambda rng: rng.choice(PLACES),
    ),
    Register(
        "The following is the diary of a harbour.",
        "On that day {0} unloaded {1} crates of {2}.",
        "How many crates did {0} unload?",
        "The number of crates is",
        _ship,
        lambda rng: rng.choice(WARES),
    ),
    Register(
        "The following is a report on guests of a hotel.",
        "{0} from the {2} stayed in room {1}.",
        "In which room did {0} stay?",
        "The room is",
        _full_name,
        lambda rng: rng.choice(PLACES),
    ),
)


def uniform(rng: Random, number: int) -> Recipe:
    """One of many sentences of one kind, of which each tells the same of another."""
    register = REGISTERS[number % len(REGISTERS)]
    depth, seed = rng.random(), rng.random()
    target = register.key(rng)
    fact = str(rng.randrange(100, 1000))
    needle = register.sentence.format(target, fact, register.second(rng))
    question = register.question.format(target)

    def draft(units: int) -> Draft:
        source = Random(seed)
        keys = distinct(register.key, units, source, {target})
        lines = [
            _capital(register.sentence.format(key, source.randrange(100, 1000), register.second(source)))
            for key in keys
        ]
        lines.insert(round(depth * len(lines)), _capital(needle))
        prefix = _capital(register.prefix.format(target))
        return Draft(f"{register.intro}\n\n{join(lines)}\n\n{question}", prefix, (fact,))

    return Recipe(draft, most=len(NAMES) * len(TOWNS) // 2)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
