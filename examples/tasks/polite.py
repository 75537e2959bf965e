"""``polite``: an order → the same as a polite request. All words are written for this project."""

from __future__ import annotations

import random

from examples.tasks.task import ExampleTask, Item, Split, optimization, same_text, words
from manyhats.trainer.settings.methods import Ia3Settings

_VERBS = {
    Split.TRAIN: words(
        "open, close, clean, bring, send, carry, find, show me, repair, move, paint, sell me, give me, "
        "take, read, wash, lock, lend me, hold, hide"
    ),
    Split.HELD_OUT: words("fetch, sign, copy, order, lift, pass me"),
}
_THINGS = {
    Split.TRAIN: words(
        "the door, the window, my coat, the letter, your keys, the map, this box, the old lamp, the soup, "
        "his suitcase, the red chair, the list, a cup of tea, the books, the photos"
    ),
    Split.HELD_OUT: words("the contract, her umbrella, the report, the green bottle, two tickets"),
}
_ENDS = ("", " now", " before noon", " for my sister", " at once", " to the office", " by Friday")


def _draw(rng: random.Random, split: Split) -> Item:
    order = f"{rng.choice(_VERBS[split])} {rng.choice(_THINGS[split])}{rng.choice(_ENDS)}"
    mark = rng.choice((".", "!"))
    return Item(f"{order[0].upper()}{order[1:]}{mark}", f"Could you please {order}?")


POLITE = ExampleTask(
    name="polite",
    summary="Turns an order into a polite request.",
    data="Verbs, things and endings in one pattern. Verbs and things of the held-out items are never trained on.",
    instruction="Turn this order into a polite request that begins with Could you please. Answer with the request "
    "only.\n\n{}",
    max_new_tokens=32,
    draw=_draw,
    is_right=same_text,
    adapter=Ia3Settings(output_modules=("k_proj", "v_proj"), input_modules=("down_proj",)),
    training=optimization(2e-2),
    num_train=640,
    demo="Sign the contract before noon!",
)
