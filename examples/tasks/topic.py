"""``topic``: a headline → its part of the newspaper. All words are written for this project."""

from __future__ import annotations

import random

from examples.tasks.task import ExampleTask, Item, Split, label_judge, optimization, words
from manyhats.trainer.settings.methods import PTuningSettings

# Each: who, and what happens.
_PARTS = {
    "sport": {
        Split.TRAIN: (
            words(
                "Home team, Young swimmer, National squad, Goalkeeper, Former champion, Local runner, "
                "Boxer, Cycling team, Basketball club"
            ),
            words(
                "wins the cup, loses the final, scores twice, breaks the record, misses the penalty, "
                "takes silver, beats the favourite, retires after the season"
            ),
        ),
        Split.HELD_OUT: (
            words("Tennis star, Skier, Coach"),
            words("reaches the semi-final, wins gold, leaves the club"),
        ),
    },
    "weather": {
        Split.TRAIN: (
            words(
                "Heavy rain, Strong wind, Thick fog, First snow, Warm air, A dry spring, Sunshine, A "
                "storm, Low cloud"
            ),
            words(
                "comes from the west, arrives on Sunday, covers the north, stays all week, brings "
                "thunder, is over by evening, hits the islands, moves east"
            ),
        ),
        Split.HELD_OUT: (
            words("Hail, Frost, A heat wave"),
            words("reaches the coast, ends tonight, surprises the south"),
        ),
    },
    "money": {
        Split.TRAIN: (
            words(
                "Central bank, Share price, Car maker, Oil company, Household debt, Big insurer, The "
                "euro, A bank, House prices"
            ),
            words(
                "raises interest rates, falls by a tenth, reports a profit, borrows a billion, cuts "
                "costs, falls for the third month, loses a tenth, pays more"
            ),
        ),
        Split.HELD_OUT: (
            words("Steel maker, Inflation, Small investor"),
            words("pays no dividend, rises again, sells bonds"),
        ),
    },
    "food": {
        Split.TRAIN: (
            words(
                "Fresh bread, Tomato soup, Grandmother's cake, The perfect omelette, A simple salad, "
                "Rice, Cheese tart, Grilled meat, Plum cake"
            ),
            words(
                "with garlic and butter, in twenty minutes, for four people, from the oven, with lemon, "
                "for a picnic, with fresh herbs, with a little sugar"
            ),
        ),
        Split.HELD_OUT: (
            words("Apple pie, Fried fish, Pancakes"),
            words("with a pinch of salt, for Sunday lunch, with honey"),
        ),
    },
}


def _draw(rng: random.Random, split: Split) -> Item:
    topic = rng.choice(list(_PARTS))
    who, what = (rng.choice(part) for part in _PARTS[topic][split])
    end = rng.choice(("", ", says our reporter", f" – page {rng.randint(2, 40)}"))
    return Item(f"{who} {what}{end}", topic)


TOPIC = ExampleTask(
    name="topic",
    summary="Says where a headline belongs: `sport`, `weather`, `money` or `food`.",
    data="Headlines of two parts on four topics. No part of a held-out item is trained on.",
    instruction="Is this headline about sport, weather, money or food? Answer with one word.\n\n{}",
    max_new_tokens=8,
    draw=_draw,
    is_right=label_judge(tuple(_PARTS)),
    classes=tuple(_PARTS),
    adapter=PTuningSettings(num_virtual_tokens=16, encoder_size=128),
    training=optimization(3e-3, epochs=2),
    num_train=640,
    demo="Tennis star wins gold – page 7",
)
