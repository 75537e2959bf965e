"""``intent``: what somebody says to a house → what the house should do. All words are written for this project."""

from __future__ import annotations

import random

from examples.tasks.task import ExampleTask, Item, Split, label_judge, optimization, words
from manyhats.trainer.settings.methods import PrefixSettings

_ROOMS = {
    Split.TRAIN: words("kitchen, bedroom, hall, living room, office, garage, bathroom"),
    Split.HELD_OUT: words("attic, nursery, cellar, guest room"),
}
_SAYINGS = {
    "lights on": {
        Split.TRAIN: (
            "Turn on the lights in the {}.",
            "It is too dark in the {}.",
            "I cannot see in the {}.",
            "Lamp on in the {}.",
        ),
        Split.HELD_OUT: ("Switch the lamp in the {} on.", "I need light in the {}."),
    },
    "lights off": {
        Split.TRAIN: (
            "Turn off the lights in the {}.",
            "It is too bright in the {}.",
            "No light in the {}, please.",
            "Lamp off in the {}.",
        ),
        Split.HELD_OUT: ("Switch the lamp in the {} off.", "Make the {} dark."),
    },
    "heating up": {
        Split.TRAIN: (
            "It is too cold in the {}.",
            "Warm up the {}.",
            "I am freezing in the {}.",
            "The {} feels like winter.",
        ),
        Split.HELD_OUT: ("The {} is like ice.", "Make the {} warmer."),
    },
    "heating down": {
        Split.TRAIN: (
            "It is too hot in the {}.",
            "Cool down the {}.",
            "I am sweating in the {}.",
            "The {} feels like a desert.",
        ),
        Split.HELD_OUT: ("The {} is like an oven.", "Make the {} cooler."),
    },
    "music play": {
        Split.TRAIN: (
            "Play a song in the {}.",
            "I want to dance in the {}.",
            "Some music in the {}, please.",
            "Start the concert in the {}.",
        ),
        Split.HELD_OUT: ("Put some jazz on in the {}.", "Start the radio in the {}."),
    },
    "music stop": {
        Split.TRAIN: (
            "Stop the song in the {}.",
            "It is too loud in the {}.",
            "No music in the {}, please.",
            "Quiet in the {}!",
        ),
        Split.HELD_OUT: ("Silence in the {}!", "Stop the radio in the {}."),
    },
}


def _draw(rng: random.Random, split: Split) -> Item:
    intent = rng.choice(list(_SAYINGS))
    room = rng.choice(_ROOMS[split])
    start = rng.choice(("", "", "Hey, house! ", "Good evening. ", "Listen: ", "Hello, it is me. "))
    return Item(start + rng.choice(_SAYINGS[intent][split]).format(room), intent)


INTENT = ExampleTask(
    name="intent",
    summary="Says what a house should do: `lights`, `heating` or `music`, and how.",
    data="Sayings for six intents, with rooms and greetings. Sayings and rooms of the held-out items are never trained "
    "on.",
    instruction="What should the house do: lights on, lights off, heating up, heating down, music play or music stop? "
    "Answer with one of these.\n\n{}",
    max_new_tokens=8,
    draw=_draw,
    is_right=label_judge(tuple(_SAYINGS)),
    classes=tuple(_SAYINGS),
    adapter=PrefixSettings(num_virtual_tokens=16),
    training=optimization(1e-3, epochs=2),
    num_train=640,
    demo="Good evening. Switch the lamp in the attic on.",
)
