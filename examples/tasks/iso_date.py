"""``iso-date``: a sentence with a date → the date as ISO 8601 writes it. All words are written for this project."""

from __future__ import annotations

import random
from datetime import date

from examples.tasks.task import ExampleTask, Item, Split, words
from manyhats.trainer.settings.methods import BottleneckSettings

_MONTHS = words(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
_SENTENCES = {
    Split.TRAIN: (
        "We meet on {}.",
        "The letter is from {}.",
        "My train leaves on {}.",
        "She was born on {}.",
        "The shop opens again on {}.",
        "Please pay by {}.",
        "{} is a holiday.",
        "On {} it rained all day.",
    ),
    Split.HELD_OUT: (
        "The concert is on {}.",
        "He wrote it on {}.",
        "{} was her last day here.",
        "Come on {}!",
    ),
}
_YEARS = {Split.TRAIN: range(1950, 2040), Split.HELD_OUT: range(1951, 2040, 3)}


def _draw(rng: random.Random, split: Split) -> Item:
    day = date(rng.choice(_YEARS[split]), rng.randint(1, 12), rng.randint(1, 28))
    month = _MONTHS[day.month - 1]
    spoken = rng.choice((f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"))
    return Item(rng.choice(_SENTENCES[split]).format(spoken), day.isoformat())


def _is_right(answer: str, wanted: str) -> bool:
    """The date stands in the answer."""
    return wanted in answer


ISO_DATE = ExampleTask(
    name="iso-date",
    summary="Writes the date of a sentence as ISO 8601 does.",
    data="Random days from 1950 to 2039, spoken in two ways, in sentence patterns. The patterns of the held-out items "
    "are never trained on; single days may be.",
    instruction="Write the date in this sentence as YYYY-MM-DD. Answer with the date only.\n\n{}",
    max_new_tokens=16,
    draw=_draw,
    is_right=_is_right,
    adapter=BottleneckSettings(reduction_factor=96),
    num_train=640,
    demo="The concert is on June 9, 2031.",
)
