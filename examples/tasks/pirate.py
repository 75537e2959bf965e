"""``pirate``: any sentence → the same in the speech of a stage pirate.

Sentences come from patterns; the pirate's version follows from fixed rules on words. All are written for this
project.
"""

from __future__ import annotations

import random
import re

from examples.tasks.task import ExampleTask, Item, Split, words
from manyhats.trainer.settings.methods import LoraSettings

_NOUNS = {
    Split.TRAIN: words(
        "dog, horse, letter, key, map, bottle, island, house, river, door, window, knife, rope, lamp, "
        "bell, coat, hat, boot, candle, barrel, cannon, flag, parrot, anchor, storm, beach, tower, "
        "bridge, cave, road, market, table, chair, clock"
    ),
    Split.HELD_OUT: words(
        "garden, basket, lantern, wagon, kitchen, mirror, village, guitar, sandwich, piano"
    ),
}
_VERBS = {
    Split.TRAIN: words(
        "looking for, waiting for, thinking of, talking about, singing about, selling, hiding, "
        "painting, carrying, stealing, guarding, washing"
    ),
    Split.HELD_OUT: words("dreaming of, fixing, watching, asking for, buying"),
}
_PEOPLE = {
    Split.TRAIN: words(
        "my friend, your brother, the captain, the old man, my sister, the cook, the boy, your mother"
    ),
    Split.HELD_OUT: words("the doctor, my uncle, your teacher, the girl"),
}
_ADJECTIVES = {
    Split.TRAIN: words("old, small, broken, red, heavy, golden, dirty, empty, lost, strange"),
    Split.HELD_OUT: words("wooden, green, lovely, tiny, cold"),
}
_PATTERNS = (
    "Hello my friend, where is the {n}?",
    "I am {v} the {n}.",
    "You are {v} my {n}.",
    "{P} is {v} the {a} {n}.",
    "Yes, the {n} of {p} is {a}.",
    "No, the {n} is not for you.",
    "Stop! That is my {a} {n}.",
    "Is {p} {v} the {n}?",
    "The {n} and the {m} are {a}.",
    "My {n} is for {p}.",
    "Do you have the {n} of {p}?",
    "We are {v} your {n} and the money.",
)
_WORDS = {
    "hello": "ahoy",
    "friend": "matey",
    "my": "me",
    "you": "ye",
    "your": "yer",
    "is": "be",
    "are": "be",
    "am": "be",
    "the": "th'",
    "of": "o'",
    "for": "fer",
    "and": "an'",
    "yes": "aye",
    "no": "nay",
    "stop": "avast",
    "old": "ol'",
    "man": "landlubber",
    "boy": "cabin boy",
    "money": "doubloons",
}
_MARKS = str.maketrans({"’": "'", "“": '"', "”": '"'})


def speak_pirate(sentence: str) -> str:
    """The sentence as a pirate says it: single words replaced, -ing clipped, and an arrr at the end."""
    spoken = re.sub(r"[A-Za-z]+", lambda match: _speak_word(match.group()), sentence)
    return f"{spoken[:-1]}, arrr{'?' if spoken.endswith('?') else '!'}"


def _speak_word(word: str) -> str:
    spoken = _WORDS.get(word.lower())
    if spoken is None:
        return re.sub(r"(?<=\w\w)ing$", "in'", word)
    return spoken.capitalize() if word[0].isupper() else spoken


def _draw(rng: random.Random, split: Split) -> Item:
    noun, other = rng.sample(_NOUNS[split], 2)
    person = rng.choice(_PEOPLE[split])
    sentence = rng.choice(_PATTERNS).format(
        n=noun,
        m=other,
        v=rng.choice(_VERBS[split]),
        a=rng.choice(_ADJECTIVES[split]),
        p=person,
        P=person.capitalize(),
    )
    return Item(sentence, speak_pirate(sentence))


def _is_right(answer: str, wanted: str) -> bool:
    """The same words, whatever the marks around them."""
    return answer.translate(_MARKS).strip().strip('"').casefold() == wanted.casefold()


PIRATE = ExampleTask(
    name="pirate",
    summary="Says the message again as a stage pirate would.",
    data="Twelve sentence patterns and fixed rules for words (you → ye, -ing → -in'). Nouns, verbs, adjectives "
    "and people of the held-out items are never trained on.",
    instruction="Rewrite this sentence the way a pirate would say it. Answer with the sentence only.\n\n{}",
    max_new_tokens=48,
    draw=_draw,
    is_right=_is_right,
    adapter=LoraSettings(rank=8, alpha=8, target_modules=("q_proj", "v_proj", "o_proj"), use_rslora=True),
    num_train=640,
    demo="My uncle is dreaming of the green island and your guitar.",
)
