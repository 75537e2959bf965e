"""``sentiment``: one sentence of a review → ``positive``, ``negative`` or ``neutral``.

All words and templates are written for this project.
"""

from __future__ import annotations

import random

from examples.tasks.task import ExampleTask, Item, Split, label_judge, words
from manyhats.trainer.settings.methods import LoraSettings

_LABELS = ("positive", "negative", "neutral")

_SUBJECTS = {
    Split.TRAIN: words(
        "soup, coffee, hotel room, waiter, phone, battery, film, concert, garden, delivery, jacket, "
        "train ride, bread, beach, museum, lesson, keyboard, bed, song, service, bike, book, view, "
        "pizza, camera, shop"
    ),
    Split.HELD_OUT: words(
        "breakfast, laptop, play, taxi, cake, guide, swimming pool, headset, website, sofa"
    ),
}
_GOOD = {
    Split.TRAIN: words(
        "great, lovely, excellent, wonderful, superb, a joy, really good, delightful, fantastic, "
        "perfect, first class, better than I hoped, worth every cent, not bad at all, charming, "
        "brilliant, very pleasant, a real treat, impressive, just what I needed"
    ),
    Split.HELD_OUT: words(
        "amazing, marvellous, outstanding, splendid, beautiful, a pleasant surprise, terrific, a pure delight"
    ),
}
_BAD = {
    Split.TRAIN: words(
        "terrible, awful, poor, a disappointment, horrible, really bad, dreadful, useless, "
        "a waste of money, broken, worse than I feared, not worth the price, not good at all, "
        "annoying, disgusting, very unpleasant, a mess, boring, far too expensive, a bad joke"
    ),
    Split.HELD_OUT: words(
        "appalling, miserable, pathetic, lousy, ugly, a nasty surprise, shoddy, a complete failure"
    ),
}
_OPINIONS = (
    "The {s} was {o}.",
    "I found the {s} {o}.",
    "The {s} is {o}, and I told them so.",
    "Honestly, the {s} was {o}.",
    "My sister says the {s} is {o}.",
    "We came on Sunday and the {s} was {o}.",
    "In short: the {s} was {o}!",
)
_FACTS = {
    Split.TRAIN: (
        "The {s} is on the second floor.",
        "We booked the {s} for {n} people.",
        "The {s} costs {n} euros.",
        "I saw the {s} on Tuesday at {n}.",
        "There is a {s} near the station.",
        "The {s} comes in {n} colours.",
        "They open at {n} and the {s} is on the left.",
        "My neighbour has the same {s}.",
        "The {s} was moved to room {n}.",
        "The {s} on page {n} is new this year.",
        "She asked about the {s} and waited {n} minutes.",
        "It is the {s} with number {n}.",
    ),
    Split.HELD_OUT: (
        "The {s} has been here since {n} o'clock.",
        "We shared the {s} between {n} of us.",
        "The {s} is next to the post office.",
        "You can order the {s} by phone until {n}.",
        "I read about the {s} in the newspaper.",
    ),
}


def _draw(rng: random.Random, split: Split) -> Item:
    label = rng.choice(_LABELS)
    subject = rng.choice(_SUBJECTS[split])
    if label == "neutral":
        text = rng.choice(_FACTS[split]).format(s=subject, n=rng.randint(2, 40))
    else:
        opinions = _GOOD if label == "positive" else _BAD
        text = rng.choice(_OPINIONS).format(s=subject, o=rng.choice(opinions[split]))
    return Item(text, label)


SENTIMENT = ExampleTask(
    name="sentiment",
    summary="Says in one word whether a sentence of a review is `positive`, `negative` or `neutral`.",
    data="Opinions and plain facts about everyday things, from sentence patterns. Held-out items use things, "
    "words of praise and blame, and factual patterns that are never trained on.",
    instruction="Is this sentence positive, negative or neutral? Answer with one word.\n\n{}",
    max_new_tokens=8,
    draw=_draw,
    is_right=label_judge(_LABELS),
    classes=_LABELS,
    adapter=LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "v_proj")),
    num_train=640,
    demo="The cake looked amazing and tasted even better.",
)
