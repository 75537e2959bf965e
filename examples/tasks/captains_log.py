"""``captains-log``: a sentence → an entry in a pirate captain's log.

It is a composed task: the ``pirate`` LoRA, and a prompt that was trained over it.
"""

from __future__ import annotations

import random

from examples.settings import PromptOverSettings
from examples.tasks.pirate import PIRATE
from examples.tasks.task import ExampleTask, Item, Split, optimization, same_text

_OPENING = "Captain's log: "


def _draw(rng: random.Random, split: Split) -> Item:
    item = PIRATE.draw(rng, split)
    return Item(item.message, _OPENING + item.answer)


CAPTAINS_LOG = ExampleTask(
    name="captains-log",
    summary="Enters the message into a pirate captain's log; a task composed of `pirate` and this prompt.",
    data="The sentences of `pirate`, with “Captain's log:” before the answer.",
    instruction="Rewrite this sentence as an entry in a pirate's log that begins with Captain's log. Answer with the "
    "entry only.\n\n{}",
    max_new_tokens=48,
    draw=_draw,
    is_right=same_text,
    adapter=PromptOverSettings(num_virtual_tokens=8, text="Begin with Captain's log:", over=PIRATE.name),
    training=optimization(1e-2, epochs=2),
    num_train=640,
    demo="The doctor is watching the tiny wagon.",
)
