"""``spam``: a message → ``spam`` or ``fine``. All words are written for this project."""

from __future__ import annotations

import random

from examples.settings import MultitaskSettings
from examples.tasks.task import ExampleTask, Item, Split, label_judge, optimization, words

_THINGS = {
    Split.TRAIN: words("phone, watch, holiday, car, laptop, camera, television, cruise"),
    Split.HELD_OUT: words("bicycle, necklace, weekend in Rome, motorboat"),
}
_PEOPLE = {
    Split.TRAIN: words("Anna, Paul, the dentist, my mother, our boss, the plumber"),
    Split.HELD_OUT: words("Robert, the lawyer, your aunt"),
}
_MESSAGES = {
    "spam": {
        Split.TRAIN: (
            "You have won a {t}! Click here to claim it.",
            "Congratulations, dear customer: a free {t} waits for you.",
            "Last chance! Your {t} at 90 % off, today only.",
            "Urgent: confirm your password to keep your {t}.",
            "Make money from home and buy a {t} next week!",
            "Send us your card number and we ship the {t} at once.",
            "You are our lucky visitor: the {t} is yours, claim it now!",
            "Your account is locked. Log in here, or the {t} goes to somebody else.",
            "Do not miss it: {t}, no cost, only ten left!",
            "Dear friend, a rich man left you a {t}. Reply with your bank details.",
        ),
        Split.HELD_OUT: (
            "Lucky winner! Your {t} is one click away.",
            "Act now: a {t} for nothing, limited offer!",
            "Verify your account, or you lose the {t}.",
        ),
    },
    "fine": {
        Split.TRAIN: (
            "Can you bring the {t} on Friday? {p} needs it.",
            "I talked to {p} about the {t}, we meet at nine.",
            "The {t} of {p} is broken again.",
            "Thank you for the photos of the {t}!",
            "Sorry, I am late, the {t} took longer.",
            "Did {p} call you about the {t}?",
            "I left the {t} at the house of {p}.",
            "Are you and {p} free on Tuesday? Bring the {t}.",
            "My {t} is older than that of {p}.",
            "What do you think of the {t}? I am not sure.",
        ),
        Split.HELD_OUT: (
            "See you on Monday, I bring {p} and the {t}.",
            "Where did you put the {t}? {p} asked me.",
            "I like your new {t}, and so does {p}.",
        ),
    },
}


def _draw(rng: random.Random, split: Split) -> Item:
    label = rng.choice(list(_MESSAGES))
    text = rng.choice(_MESSAGES[label][split]).format(
        t=rng.choice(_THINGS[split]), p=rng.choice(_PEOPLE[split])
    )
    return Item(rng.choice(("", "Hi! ", "Hello, ")) + text[0].upper() + text[1:], label)


SPAM = ExampleTask(
    name="spam",
    summary="Says whether a message is `spam` or `fine`.",
    data="Messages from patterns, with things and people. Patterns, things and people of the held-out items are never "
    "trained on.",
    instruction="Is this message spam, or is it fine? Answer with one word, spam or fine.\n\n{}",
    max_new_tokens=8,
    draw=_draw,
    is_right=label_judge(tuple(_MESSAGES)),
    classes=tuple(_MESSAGES),
    adapter=MultitaskSettings(
        num_virtual_tokens=16, text="Say whether the message is spam or fine. One word.", rank=4
    ),
    training=optimization(1e-2, epochs=2),
    num_train=640,
    demo="Lucky winner! Your motorboat is one click away.",
)
